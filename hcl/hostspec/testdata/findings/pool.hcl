host "metal-01" {
  egress_interface = "eno1"
}

image "ubuntu" {
  ubuntu {
    release = "noble"
  }
}

pool "small" {
  image         = image.ubunut # ERROR: There is no image "ubunut". Did you mean image.ubuntu?
  cpus          = 0      # ERROR: cpus must be between 1 and 254; got 0.
  memory        = 8      # ERROR: "8": the unit is missing: write "8GiB" or "8MiB"
  disk          = "8GB"  # ERROR: the units are KiB, MiB, GiB and TiB (powers of 1024): write "8GiB"
  start         = "hot"  # ERROR: start must be "warm" or "cold"; got "hot".
  max_instances = -1     # ERROR: max_instances must be between 1 and
  limits {
    cpu_quota    = 4   # ERROR: "4": the % sign is missing: write "400%" for 4 CPUs
    disk_iops    = 0   # ERROR: Omit it for no limit
    network_mbps = "fast" # ERROR: network_mbps must be a number; got a string
    disk_iop     = 1 # ERROR: limits may have: cpu_quota, disk_iops, network_mbps
  }
}

pool "units" {
  image         = image.windows # ERROR: There is no image "windows". Write image.ubuntu.
  cpus          = "two"         # ERROR: Write, for example: cpus = 4
  memory        = "8 GiB"       # ERROR: "8 GiB": a size has no space before its unit: write "8GiB"
  disk          = "30g"         # ERROR: write "30GiB"
  console       = 1             # ERROR: console must be a boolean; got a number
  max_instances = [1]           # ERROR: max_instances must be a number; got a list
  limits {
    cpu_quota = "0%" # ERROR: cpu_quota must be between 1 and 25400; got 0.
  }
  limits { # ERROR: pool "units" already has a limits block at testdata/findings/pool.hcl:33,3-9; only one is allowed
  }
}

pool "more" {
  image         = "ubuntu"     # ERROR: Write the name of an image block: image = image.ubuntu.
  cpus          = 1
  memory        = "64MiB"      # ERROR: memory must be between 128MiB and 16TiB; got 64MiB.
  disk          = "1048577KiB" # ERROR: must be a whole number of MiB; got 1048577KiB. Write "1025MiB"
  max_instances = 1
}

pool "refs" {
  image         = pool.small # ERROR: Write the name of an image block
  cpus          = image.ubuntu # ERROR: image.NAME must stand alone, as in image = image.NAME; it has no value to use in an expression
  memory        = "99999999999999999999GiB" # ERROR: the number is too large
  disk          = "lots" # ERROR: a size is a whole number and a unit, such as "8GiB"
  max_instances = 1
  limits {
    cpu_quota = "four" # ERROR: a quota is a whole number of percent
  }
}

pool "small" { # ERROR: The pool "small" is already defined at && ERROR: pool "small" needs image. Write, for example: image = image.ubuntu && ERROR: needs cpus && ERROR: needs memory && ERROR: needs disk && ERROR: needs max_instances
}
