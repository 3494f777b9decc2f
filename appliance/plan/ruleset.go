package plan

// Ruleset is the firewall as data: what is written as nftables text and what is
// sent over netlink are both made from it.
type Ruleset struct{}
