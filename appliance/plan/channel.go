package plan

// The two names of the channel between a guest and its host. The VMM offers it, the guest part looks for it.
const (
	GuestPort  = "dev.fleetingd.guest" // a virtio-serial port
	GuestVsock = 7071                  // a vsock port of the host (CID 2), on a VMM that has vsock
)
