package compile_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// poolsSpec is a spec with these pools ("a=2": two workers) and images ("i").
func poolsSpec(bits int, pools, images []string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "host \"h\" {\n egress_interface = \"eno1\"\n network { subnet = \"172.16.70.0/%d\" }\n}\n", bits)
	for _, i := range images {
		fmt.Fprintf(&b, "image %q {\n file {\n disk = \"/d\"\n kernel = \"/k\"\n }\n}\n", i)
	}
	for _, p := range pools {
		name, n, _ := strings.Cut(p, "=")
		fmt.Fprintf(&b, "pool %q {\n image = image.%s\n cpus = 1\n memory = \"1GiB\"\n disk = \"4GiB\"\n max_instances = %s\n}\n", name, images[0], n)
	}
	return b.String()
}

func after(t *testing.T, former *plan.Plan, bits int, pools, images []string) *plan.Plan {
	t.Helper()
	p, diags := compile.Compile(load(t, "host.hcl", poolsSpec(bits, pools, images)), compile.Options{Former: former})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	return p
}

// layout shows whose slots are which: "a=0,1 b=2 i=3".
func layout(p *plan.Plan) string {
	var all []string
	add := func(name string, slots ...plan.Slot) {
		var indexes []string
		for _, s := range slots {
			indexes = append(indexes, fmt.Sprint(s.Index))
		}
		all = append(all, name+"="+strings.Join(indexes, ","))
	}
	for i := range p.Pools {
		add(p.Pools[i].Name, p.PoolSlots(&p.Pools[i])...)
	}
	for i := range p.Images {
		add(p.Images[i].Name, p.BuildSlot(&p.Images[i]))
	}
	return strings.Join(all, " ")
}

// TestFormer: what stays keeps its slots, and what is new takes those that nobody had, while there are any.
func TestFormer(t *testing.T) {
	list := func(s ...string) []string { return s }
	former := after(t, nil, 28, list("a=2", "b=3"), list("i")) // 14 slots fit
	if got, want := layout(former), "a=0,1 b=2,3,4 i=5"; got != want {
		t.Fatalf("without a former plan: %s, want %s", got, want)
	}
	for name, c := range map[string]struct {
		bits   int
		pools  []string
		images []string
		want   string
	}{
		"the same":           {28, list("a=2", "b=3"), list("i"), "a=0,1 b=2,3,4 i=5"},
		"in another order":   {28, list("b=3", "a=2"), list("i"), "b=2,3,4 a=0,1 i=5"},
		"a new one before":   {28, list("n=2", "a=2", "b=3"), list("i"), "n=6,7 a=0,1 b=2,3,4 i=5"},
		"one less":           {28, list("b=3"), list("i"), "b=2,3,4 i=5"},
		"one for another":    {28, list("n=2", "b=3"), list("i"), "n=6,7 b=2,3,4 i=5"},
		"one grows":          {28, list("a=4", "b=3"), list("i"), "a=0,1,6,7 b=2,3,4 i=5"},
		"one shrinks":        {28, list("a=2", "b=1"), list("i"), "a=0,1 b=2 i=5"},
		"one for the other":  {28, list("a=1", "b=4"), list("i"), "a=0 b=2,3,4,6 i=5"},
		"another image":      {28, list("a=2", "b=3"), list("j", "i"), "a=0,1 b=2,3,4 j=6 i=5"},
		"freed ones at last": {28, list("n=10", "b=3"), list("i"), "n=6,7,8,9,10,11,12,13,0,1 b=2,3,4 i=5"},
		"a larger subnet":    {24, list("a=3", "b=3"), list("i"), "a=0,1,6 b=2,3,4 i=5"},
		"a smaller subnet":   {29, list("a=2", "b=2"), list("i"), "a=0,1 b=2,3 i=5"},
		"no room for all":    {29, list("b=3", "n=2"), list("i"), "b=2,3,4 n=0,1 i=5"},
	} {
		t.Run(name, func(t *testing.T) {
			p := after(t, former, c.bits, c.pools, c.images)
			if got := layout(p); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
			for _, s := range p.Slots {
				if want := fmt.Sprintf("fleet%d 172.16.70.%d", s.Index, s.Index+2); s.TAP+" "+s.Address.String() != want {
					t.Errorf("slot %d is %s %s, want %s", s.Index, s.TAP, s.Address, want)
				}
			}
		})
	}
	narrow := after(t, after(t, nil, 24, list("a=20"), list("i")), 29, list("a=4"), list("i"))
	if got, want := layout(narrow), "a=0,1,2,3 i=4"; got != want {
		t.Errorf("slots that do not fit a smaller subnet: %s, want %s", got, want)
	}
}

// TestFormerChain: through any series of changes a pool keeps the slots that it had, as far as it still has so many, and each plan is valid.
// Once nothing changes, the plan stays the same, bytes and all.
func TestFormerChain(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var former *plan.Plan
	for round := range 200 {
		var pools []string
		for _, name := range []string{"a", "b", "c", "d", "e"} {
			if n := random.IntN(6); n > 0 {
				pools = append(pools, fmt.Sprintf("%s=%d", name, n))
			}
		}
		if pools == nil {
			continue
		}
		random.Shuffle(len(pools), func(i, j int) { pools[i], pools[j] = pools[j], pools[i] })
		images := []string{"i", "j", "k"}[:1+random.IntN(3)]
		p := after(t, former, 27, pools, images)
		text, err := p.JSON()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := plan.Parse(text); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		for i := range p.Pools {
			if former == nil {
				break
			}
			had, err := former.Pool(p.Pools[i].Name)
			if err != nil {
				continue // it is new
			}
			was, is := former.PoolSlots(had), p.PoolSlots(&p.Pools[i])
			n := min(len(was), len(is))
			if diff := cmp.Diff(addressesOf(was[:n]), addressesOf(is[:n])); diff != "" {
				t.Fatalf("round %d: pool %s moved:\n%s", round, had.Name, diff)
			}
		}
		again, err := after(t, p, 27, pools, images).JSON()
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(again, text) {
			t.Fatalf("round %d: the same spec gives another plan:\n%s", round, cmp.Diff(string(text), string(again)))
		}
		former = p
	}
}

func addressesOf(slots []plan.Slot) []string {
	var all []string
	for _, s := range slots {
		all = append(all, fmt.Sprint(s.Index, s.TAP, s.Address))
	}
	return all
}
