host "metal-01" {
  egress_interface = "eno1"
  network {
    subnet = "10.16.0.0/12"
  }
}

image "debian" {
  debian {
    suite = "trixie"
  }
}

pool "a" {
  image         = image.debian
  cpus          = 1
  memory        = "1GiB"
  disk          = "5GiB"
  max_instances = 65535
}

pool "b" {
  image         = image.debian
  cpus          = 1
  memory        = "1GiB"
  disk          = "5GiB"
  max_instances = 1 # ERROR: With this pool, the host has 65537 slots for workers and images; it can have 65536. Lower max_instances
}

pool "c" {
  image         = image.debian
  cpus          = 1
  memory        = "1GiB"
  disk          = "5GiB"
  max_instances = 65537 # ERROR: max_instances must be between 1 and 65536; got 65537.
}
