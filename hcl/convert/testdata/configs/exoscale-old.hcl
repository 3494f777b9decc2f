# Written by fleetingd convert from config.toml. Settings that a spec has no place for are in comments where
# they would be. Read each of them: jobs may depend on it.
#
# It holds no secrets. Put each one into the file named below, readable by root only. To write all of them at
# once:
#   fleetingd convert config.toml --secrets-dir /etc/fleetingd/secrets -o host.hcl

host "ci-01" {
  egress_interface = "eno1" # the interface of the default route (ip route show default)

  gitlab_runner {
    concurrent = 2
  }
}

# Add to packages and run what else the machines of config.toml had.
image "docker" {
  ubuntu {
    release = "noble"
  }

  prebuild {
    packages = ["docker.io"]
    run = [
      "usermod -aG docker ubuntu",
    ]
  }
}

# Add to packages and run what else the machines of config.toml had.
image "ubuntu" {
  ubuntu {
    release = "noble"
  }

  prebuild {
    packages = ["ca-certificates", "curl", "git"]
    run = [
      "DEBIAN_FRONTEND=noninteractive apt-get -y upgrade",
      "curl -fsSL \"https://packages.gitlab.com/install/repositories/runner/gitlab-runner/script.deb.sh\" | os=ubuntu dist=noble bash",
      "DEBIAN_FRONTEND=noninteractive apt-get -y install gitlab-runner",
    ]
  }
}

pool "ci" {
  image         = image.docker
  cpus          = 2 # not in config.toml: set what jobs need
  memory        = "4GiB"
  disk          = "50GiB" # exoscale-disk-size=50
  start         = "cold"
  max_instances = 3
  # [runners.machine] MachineOptions, and what stands in for them:
  #   exoscale-api-key=***, exoscale-api-secret-key=***
  #     -> nothing: no cloud is involved
  #   exoscale-instance-profile=large
  #     -> nothing
  #   exoscale-disk-size=50
  #     -> disk of the pool; all disks are on this host
  # [runners.machine] MachineDriver = "exoscale"
  #   -> Workers are VMs on this host; no cloud is involved.
  # [runners.machine] MachineName = "gitlab-ci-%s"
  #   -> Workers are named after their pool.
}

runner "ci" {
  pool  = pool.ci
  url   = "http://gitlab.internal:8080/"
  token = file("/run/secrets/ci-token")
  # Replaces docker+machine: each job runs in a container, in a VM on this host.
  executor = "docker-autoscaler"

  capacity_per_instance = 1
  max_use_count         = 0 # no limit, as in config.toml; 1 gives each job a fresh VM

  policy {
    idle_count = 1
    idle_time  = "0s"
  }

  settings = {
    docker = {
      image      = "debian:12"
      privileged = true
      services = [
        {
          alias = "docker"
          name  = "docker:dind"
        },
      ]
      services_tmpfs = {
        "/var/lib/mysql" = "rw,noexec"
      }
    }
    environment = ["GIT_SSL_NO_VERIFY=1"]
  }
}

pool "plain" {
  image         = image.ubuntu
  cpus          = 2 # not in config.toml: set what jobs need
  memory        = "4GiB"
  disk          = "30GiB" # not in config.toml: set what jobs need
  start         = "cold"
  max_instances = 1
  # [runners.machine] IdleCount = 0
  #   -> The executor shell does not use it.
}

runner "plain" {
  pool  = pool.plain
  url   = "http://gitlab.internal:8080/"
  token = file("/run/secrets/plain-token")
  # Replaces shell: jobs run in the shell of a VM, and find the programs of its image instead of the host's.
  executor = "instance"

  capacity_per_instance = 1
  max_use_count         = 1
}
