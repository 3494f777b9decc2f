# Servers that workers cannot connect to.
host "metal-01" {
  egress_interface = "eno1"
  network {
    subnet = "172.16.120.0/24"
    egress "no-web" {
      action = "deny"
      to     = ["198.41.0.0/16", "10.20.0.9/32"]
      ports  = ["tcp/80-443"]
    }
    egress "gitlab" {
      action = "allow"
      to     = ["10.20.0.4/31", "10.20.0.9/32"]
      ports  = ["tcp/443", "udp/8443"]
    }
    egress "out" {
      action = "allow"
    }
  }
}

image "ubuntu" {
  ubuntu {
    release = "noble"
  }
}

pool "a" {
  image         = image.ubuntu
  cpus          = 1
  memory        = "1GiB"
  disk          = "5GiB"
  max_instances = 2
}

runner "private" {
  pool  = pool.a
  url   = "https://10.20.0.3/" # WARNING: Workers of host "metal-01" cannot connect to GitLab at 10.20.0.3:443: it is private, and no egress block allows it. && WARNING: egress "gitlab-2" { && WARNING: to     = ["10.20.0.3/32"] && WARNING: ports  = ["tcp/443"]
  token = env("T")
}
runner "allowed" {
  pool  = pool.a # ERROR: Pool used twice
  url   = "https://10.20.0.5/"
  token = env("T")
}
runner "allowed-on-another-port" {
  pool  = pool.a # ERROR: Pool used twice
  url   = "https://10.20.0.5:8443/" # WARNING: GitLab at 10.20.0.5:8443: it is private && WARNING: ports  = ["tcp/8443"]
  token = env("T")
}
runner "denied-first" {
  pool  = pool.a # ERROR: Pool used twice
  url   = "https://10.20.0.9" # WARNING: the egress block "no-web" denies it. Write in the network block, before its other egress blocks:
  token = env("T")
}
runner "public-denied" {
  pool  = pool.a # ERROR: Pool used twice
  url   = "http://198.41.7.7" # WARNING: GitLab at 198.41.7.7:80: the egress block "no-web" denies it.
  token = env("T")
}
runner "public" {
  pool  = pool.a # ERROR: Pool used twice
  url   = "https://8.8.8.8"
  token = env("T")
}
runner "name" {
  pool  = pool.a # ERROR: Pool used twice
  url   = "https://gitlab.example.com"
  token = env("T")
}
runner "ranges" {
  pool  = pool.a # ERROR: Pool used twice
  url   = "https://100.64.0.3" # WARNING: it is private
  token = env("T")
  settings = {
    clone_url = "http://169.254.10.10:8080" # WARNING: cannot connect to GitLab at 169.254.10.10:8080: it is private
    cache = { Type = "s3", s3 = {
      ServerAddress = "192.168.7.7:9000" # WARNING: cannot connect to the cache at 192.168.7.7:9000: it is private && WARNING: egress "cache" {
    } }
  }
}
runner "six" {
  pool  = pool.a # ERROR: Pool used twice
  url   = "https://[fd00::3]:8443" # WARNING: GitLab at [fd00::3]:8443: workers have no IPv6, because subnet6 is not set. Write subnet6 in the network block
  token = env("T")
}
runner "mapped" {
  pool  = pool.a # ERROR: Pool used twice
  url   = "https://[::ffff:10.20.0.3]" # WARNING: it is private && WARNING: to     = ["10.20.0.3/32"]
  token = env("T")
}
runner "self" {
  pool  = pool.a # ERROR: Pool used twice
  url   = "http://localhost:3000" # WARNING: GitLab at localhost:3000: the address means the worker itself. Write a name or an address
  token = env("T")
}
runner "loopback" {
  pool  = pool.a # ERROR: Pool used twice
  url   = "http://127.0.1.1" # WARNING: the address means the worker itself
  token = env("T")
}
runner "subnet" {
  pool  = pool.a # ERROR: Pool used twice
  url   = "https://172.16.120.9" # WARNING: it is in the workers' own subnet, and workers do not reach one another. Write the server's address, or another subnet.
  token = env("T")
}
runner "gateway" {
  pool  = pool.a # ERROR: Pool used twice
  url   = "https://172.16.120.1" # WARNING: it is the host itself, and no egress block allows it. && WARNING: to     = ["172.16.120.1/32"]
  token = env("T")
}
