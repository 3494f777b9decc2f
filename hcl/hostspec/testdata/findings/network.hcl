host "a" {
  egress_interface = "eno1"
  network {
    subnet = "10.7.0.0/29" # ERROR: Host "a" needs 31 addresses && ERROR: has only 6. Write subnet = "10.7.0.0/26", or lower max_instances
    dns    = ["10.7.0.3"]  # ERROR: is in the workers' own subnet
    mtu    = 100           # ERROR: mtu must be between 576 and 9216; got 100.
    egress "in" {
      action = "alow" # ERROR: action must be "allow" or "deny"; got "alow" (did you mean "allow"?)
      to     = ["10.7.0.15/24"] # ERROR: lies within 10.7.0.0/24: write "10.7.0.0/24" for the network, or "10.7.0.15/32" for the one address
      ports  = ["443", "tcp:25", "tcp/0", "tcp/9-5", "icmp/1"] # ERROR: "443": a port is written as "tcp/443", a range as "tcp/9000-9001": write "tcp/443" && ERROR: write "tcp/25" && ERROR: port numbers go from 1 to 65535 && ERROR: runs backwards: write "tcp/5-9" && ERROR: ports are tcp or udp, not icmp
    }
    egress "in" { # ERROR: The egress block "in" is already defined at
      action = "allow"
      to     = ["10.7.0.4/32"] # ERROR: workers never reach one another
    }
    egress "no action" { # ERROR: egress "no action" needs action && ERROR: cannot be an egress block's name
      to = [] # ERROR: An empty list matches nothing
    }
  }
}

host "b" {
  egress_interface = "eno1"
  network {
    subnet  = "fd00::/64"       # ERROR: is IPv6. Workers always have IPv4
    subnet6 = "10.1.0.0/24"     # ERROR: is IPv4. Write an IPv6 network
    dns     = ["fe80::1%eth0", "1.1.1"] # ERROR: an address is written as "1.1.1.3" && ERROR: "1.1.1": an address
  }
}

host "c" {
  egress_interface = "eno1"
  network {
    subnet  = "127.0.0.0/24"  # ERROR: overlaps 127.0.0.0/8, where no host can have an address
    subnet6 = "fe80::/64"     # ERROR: overlaps fe80::/10
    mtu     = 1279            # ERROR: mtu must be between 1280 and 9216; got 1279.
    dns     = []              # ERROR: The list is empty
  }
}

host "d" {
  egress_interface = "eno1"
  network {
    subnet = "172.16.120.0" # ERROR: the prefix length is missing: write "172.16.120.0/32" for this one address
    dns    = ["9.9.9.9", "9.9.9.9", "127.0.0.53", "2620:fe::fe"] # ERROR: The list has 4 servers; resolvers ask at most 3 && ERROR: 9.9.9.9 is in the list twice && ERROR: Workers cannot reach a name server at 127.0.0.53 && ERROR: 2620:fe::fe is IPv6, which workers do not have
    mtu    = "big" # ERROR: Write, for example: mtu = 1500
  }
}

host "e" {
  egress_interface = "eno1"
  network {
    subnet  = "8.8.8.0/24" # WARNING: 8.8.8.0/24 is public
    subnet6 = "fd00::/124" # ERROR: Write subnet6 = "fd00::/122", or lower max_instances
    dns     = "1.1.1.1"    # ERROR: dns must be a list: write dns = ["1.1.1.1"]
  }
}

host "f" {
  egress_interface = "eno1"
  network {
    subnet = "10.0.0.0/8" # ERROR: has more than a million addresses
    dns    = [null]       # ERROR: Element 0 of the list is null
    mtu    = 1500.5       # ERROR: mtu must be a whole number, such as mtu = 1500
    egress "six" {
      action = "deny"
      to     = ["2001:db8::/32"] # WARNING: 2001:db8::/32 is IPv6, which workers do not have, because subnet6 is not set
    }
  }
}

# The last address of a subnet is a worker's too: 32 - 2 is 30, and one is too few.
host "g" {
  egress_interface = "eno1"
  network {
    subnet = "10.7.0.0/27" # ERROR: Host "g" needs 31 addresses (the pools' max_instances, and one for building each image), but 10.7.0.0/27 has only 30. Write subnet = "10.7.0.0/26", or lower max_instances
  }
}

# What others take by default; the proposal leaves out what the spec itself names.
host "cures" {
  egress_interface = "eno1"
  network {
    egress "x" {
      action = "drop" # ERROR: action must be "allow" or "deny"; got "drop". Write action = "deny"
      to     = ["gitlab.example.com", "gitlab/32"] # ERROR: "gitlab.example.com": egress rules match addresses and do not resolve names: write the name's addresses, such as "203.0.113.7/32" && ERROR: "gitlab/32": egress rules match addresses and do not resolve names: write the name's addresses, such as "203.0.113.7/32"
      ports  = [443, "https", "tcp/80,443", "dns", "icmp", "80 udp/90", "what"] # ERROR: "443": a port is written as "tcp/443", a range as "tcp/9000-9001": write "tcp/443" && ERROR: "https": a port is written as "tcp/443", a range as "tcp/9000-9001": write "tcp/443" && ERROR: write "tcp/80", "tcp/443" && ERROR: write "udp/53" && ERROR: ICMP has none. Omit ports for every protocol && ERROR: write "udp/80", "udp/90" && ERROR: "what": a port is written as "tcp/443", a range as "tcp/9000-9001".
    }
  }
}

host "h" {
  egress_interface = "eno1"
  network {
    subnet = "172.17.0.0/24" # WARNING: 172.17.0.0/24 overlaps the default networks of Docker. If one of those comes up on the host, workers lose their network; in a worker, its jobs lose what they try to reach there. Write subnet = "172.16.120.0/24", for example, which nothing uses by default
  }
}

host "i" {
  egress_interface = "eno1"
  network {
    subnet = "192.168.122.0/24" # WARNING: the default networks of Docker and libvirt. && WARNING: Write subnet = "172.16.0.0/24"
    dns    = ["172.16.120.53"]
  }
}

host "j" {
  egress_interface = "eno1"
  network {
    subnet = "172.16.0.0/12" # WARNING: of Docker. && WARNING: Write subnet = "10.48.0.0/12"
    egress "site" {
      action = "allow"
      to     = ["10.16.0.0/24"]
    }
  }
}

host "k" {
  egress_interface = "eno1"
  network {
    subnet = "10.64.0.0/16"
  }
}

image "i" {
  ubuntu {
    release = "noble"
  }
}

pool "p" {
  image         = image.i
  cpus          = 1
  memory        = "1GiB"
  disk          = "5GiB"
  max_instances = 30
}
