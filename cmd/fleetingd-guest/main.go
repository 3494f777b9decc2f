// Command fleetingd-guest is only `fleetingd guest`, at a fifth of the size: it is unpacked and started twice in each
// worker's boot. If it is installed next to fleetingd, it goes into images instead of that.
package main

import (
	"os"

	"github.com/fleetingd/fleetingd/appliance/guest"
)

// version is set by the linker, like that of fleetingd.
var version = "dev"

func main() { os.Exit(guest.Command(os.Args, version)) }
