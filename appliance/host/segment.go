package host

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// segment is a TCP segment without data, from and to addresses of one family.
type segment struct {
	from, to netip.AddrPort
	flags    byte
}

// Flags of a segment (RFC 9293, 3.1).
const (
	tcpSYN = 0x02
	tcpACK = 0x10
)

// Lengths of headers without options, in bytes.
const (
	headerIPv4 = 20
	headerIPv6 = 40
	headerTCP  = 20
)

// packet is the segment as an IP packet, with right checksums: connection tracking calls others invalid.
func (s segment) packet() []byte {
	src, dst := s.from.Addr().AsSlice(), s.to.Addr().AsSlice()
	tcp := make([]byte, headerTCP)
	binary.BigEndian.PutUint16(tcp, s.from.Port())
	binary.BigEndian.PutUint16(tcp[2:], s.to.Port())
	binary.BigEndian.PutUint32(tcp[4:], 1000)
	if s.flags&tcpACK != 0 {
		binary.BigEndian.PutUint32(tcp[8:], 1001) // the other end began with 1000 as well
	}
	tcp[12], tcp[13] = headerTCP/4<<4, s.flags
	binary.BigEndian.PutUint16(tcp[14:], 65535) // window
	pseudo := append(append(append([]byte{}, src...), dst...), 0, unix.IPPROTO_TCP, 0, headerTCP)
	binary.BigEndian.PutUint16(tcp[16:], internetChecksum(pseudo, tcp))
	var ip []byte
	if s.from.Addr().Is4() {
		ip = make([]byte, headerIPv4-8)
		ip[0] = 4<<4 | headerIPv4/4
		binary.BigEndian.PutUint16(ip[2:], headerIPv4+headerTCP)
		ip[6], ip[8], ip[9] = 0x40, 64, unix.IPPROTO_TCP // do not fragment; TTL
		ip = append(append(ip, src...), dst...)
		binary.BigEndian.PutUint16(ip[10:], internetChecksum(ip))
	} else {
		ip = make([]byte, headerIPv6-32)
		ip[0] = 6 << 4
		binary.BigEndian.PutUint16(ip[4:], headerTCP)
		ip[6], ip[7] = unix.IPPROTO_TCP, 64 // hop limit
		ip = append(append(ip, src...), dst...)
	}
	return append(ip, tcp...)
}

// internetChecksum is that of RFC 1071, over parts of even length.
func internetChecksum(parts ...[]byte) uint16 {
	sum := uint32(0)
	for _, p := range parts {
		for i := 0; i+1 < len(p); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(p[i:]))
		}
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// parseSegment reads an IP packet that holds a TCP segment.
func parseSegment(b []byte) (segment, bool) {
	var src, dst netip.Addr
	switch {
	case len(b) >= headerIPv4 && b[0]>>4 == 4 && b[9] == unix.IPPROTO_TCP:
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		if n := int(b[0]&15) * 4; n >= headerIPv4 && n <= len(b) {
			b = b[n:]
		} else {
			return segment{}, false
		}
	case len(b) >= headerIPv6 && b[0]>>4 == 6 && b[6] == unix.IPPROTO_TCP:
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		b = b[headerIPv6:]
	default:
		return segment{}, false
	}
	if len(b) < headerTCP {
		return segment{}, false
	}
	return segment{netip.AddrPortFrom(src, binary.BigEndian.Uint16(b)), netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:])), b[13]}, true
}
