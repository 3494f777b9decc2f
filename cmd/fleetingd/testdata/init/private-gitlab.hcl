# A host for GitLab CI, written by fleetingd init on metal-01.example.com, Debian GNU/Linux 13 (trixie).
# It had 32 CPUs, 128.0 GiB of memory, and 900.0 GiB free for /var/lib/fleetingd. Change what you like, then:
#   fleetingd validate host.hcl # is it right?
#   fleetingd doctor host.hcl # does this machine have what it needs?

host "metal-01.example.com" {
  egress_interface = "eno1" # the interface of this machine's default route

  disks {
    backing = "directory" # the file system of /var/lib/fleetingd can clone files
  }

  network {
    subnet = "172.16.120.0/22" # one address per worker; unused on this machine

    # Workers reach the internet and nothing private, unless it is allowed here. GitLab is.
    egress "gitlab" {
      action = "allow"
      to     = ["10.20.0.15/32"]
      ports  = ["tcp/8080"]
    }
  }
}

image "ubuntu" {
  ubuntu { # Canonical's cloud image; its checksum is verified against Canonical's key
    release = "noble"
  }

  prebuild { # what every worker starts with
    packages = ["docker.io", "git", "ca-certificates", "curl"]
    # Jobs need gitlab-runner in the VM for caches and artifacts.
    run = [
      "DEBIAN_FRONTEND=noninteractive apt-get -y upgrade",
      "curl -fsSL \"https://packages.gitlab.com/install/repositories/runner/gitlab-runner/script.deb.sh\" | os=ubuntu dist=noble bash",
      "DEBIAN_FRONTEND=noninteractive apt-get -y install gitlab-runner",
      "usermod -aG docker ubuntu",
    ]
  }
}

pool "default" {
  image  = image.ubuntu
  cpus   = 4       # of 32; two virtual CPUs for each real one
  memory = "7GiB"  # all workers fit in 128.0 GiB, with room for the host
  disk   = "40GiB" # sparse: it takes what jobs write
  start  = "cold"

  max_instances = 16
}

runner "default" {
  pool     = pool.default
  url      = "http://gitlab.corp.example:8080"
  token    = file("/etc/fleetingd/gitlab-token") # read when config.toml is written; never in the spec, a plan or a log
  executor = "instance"                          # jobs run in the VM's shell; "docker-autoscaler" runs each in a container there

  max_use_count = 1 # a fresh VM for each job
  policy {
    idle_count = 4 # ready for the next jobs
    idle_time  = "10m"
  }
}
