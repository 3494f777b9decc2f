package fleet

import (
	"crypto/rand"
	"encoding/base32"
	"encoding/binary"
	"regexp"
	"sync"
	"time"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// idSource generates worker names: POOL-TIMERANDOM, a DNS label (it is the guest's host name) of at most
// 29 bytes (it is part of a socket's path). The names of a pool sort by age, and are never reused, not even by
// a later process: the time in them advances by at least a millisecond per name, and 30 random bits
// cover a clock that was set back.
type idSource struct {
	mu   sync.Mutex
	pool string
	last int64 // ms since 1970
	now  func() time.Time
}

// maxPoolLabel is how many bytes of the pool's name go into a worker's.
const maxPoolLabel = 12

// encoding keeps the order of the numbers: digits before letters, all lower case.
var encoding = base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)

var idForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,11})-[0-9a-z]{16}$`)

func newIDSource(pool string) *idSource {
	return &idSource{pool: plan.Label(pool, maxPoolLabel), now: time.Now}
}

func (s *idSource) next() string {
	s.mu.Lock()
	s.last = max(s.last+1, s.now().UnixMilli())
	t := s.last
	s.mu.Unlock()
	// 50 bits of milliseconds last for 35,000 years and make ten characters; 30 random bits make six.
	var b [8]byte
	var random [4]byte
	rand.Read(random[:]) // cannot fail: it would end the process
	binary.BigEndian.PutUint64(b[:], uint64(t)<<14)
	return s.pool + "-" + encoding.EncodeToString(b[:])[:10] + encoding.EncodeToString(random[:])[:6]
}
