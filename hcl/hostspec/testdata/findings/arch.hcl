host "metal-01" {
  egress_interface = "eno1"
}

image "a" {
  ubuntu {
    release = "noble"
  }
}

image "b" { # ERROR: The image "b" is arm64 and "a" is amd64, but host "metal-01" can run only one architecture
  debian {
    suite = "trixie"
    arch  = "arm64"
  }
}

pool "p" {
  image         = image.a
  cpus          = 1
  memory        = "1GiB"
  disk          = "5GiB"
  max_instances = 1
}
