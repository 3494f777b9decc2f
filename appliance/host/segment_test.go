package host

import (
	"net/netip"
	"testing"
)

func TestSegment(t *testing.T) {
	for _, s := range []segment{
		{netip.MustParseAddrPort("172.16.120.254:40000"), netip.MustParseAddrPort("1.1.1.1:443"), tcpSYN},
		{netip.MustParseAddrPort("[fd7e:1ee7::fffe]:40000"), netip.MustParseAddrPort("[2606:4700::1]:443"), tcpSYN | tcpACK},
	} {
		b := s.packet()
		got, ok := parseSegment(b)
		if !ok || got != s {
			t.Errorf("sent %+v, read %+v", s, got)
		}
		for cut := range b {
			if _, ok := parseSegment(b[:cut]); ok {
				t.Errorf("%d of %d bytes are a segment", cut, len(b))
			}
		}
	}
}

// What a link carries is read without a panic, whatever it is.
func FuzzSegment(f *testing.F) {
	f.Add(segment{netip.MustParseAddrPort("1.2.3.4:5"), netip.MustParseAddrPort("6.7.8.9:10"), tcpSYN}.packet())
	f.Add(segment{netip.MustParseAddrPort("[2001:db8::1]:5"), netip.MustParseAddrPort("[2001:db8::2]:10"), tcpACK}.packet())
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, ok := parseSegment(b); ok && s.from.Addr().BitLen() != s.to.Addr().BitLen() {
			t.Errorf("%+v has two families", s)
		}
	})
}
