// Command fleetingd-guest is `fleetingd guest` and nothing else, a fifth of the size: it is unpacked and started twice in each
// worker's boot. Where it lies beside fleetingd it goes into images in its place.
package main

import (
	"os"

	"github.com/fleetingd/fleetingd/appliance/guest"
)

// version is set by the linker, as fleetingd's.
var version = "dev"

func main() { os.Exit(guest.Command(os.Args, version)) }
