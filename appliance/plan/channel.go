package plan

// The names of the channel between a guest and its host: the VMM offers it under these, and the guest part looks for them.
const (
	GuestPort  = "dev.fleetingd.guest" // a virtio-serial port
	GuestVsock = 7071                  // a vsock port of the host (CID 2), on a VMM that has vsock
)
