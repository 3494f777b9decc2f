# Written by fleetingd convert from config.toml. What has no place in a spec stands beside where it would be,
# in comments that begin with its table: read each of them, since jobs may need what it says.
#
# The secrets are not in here. Put each into the file that stands for it below, readable by root alone. For
# all of them at once:
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
  cpus          = 2 # the source does not say: write what a job needs
  memory        = "4GiB"
  disk          = "50GiB" # exoscale-disk-size=50
  start         = "cold"
  max_instances = 3
  # [runners.machine] MachineOptions, and what stands in for them:
  #   exoscale-api-key=***, exoscale-api-secret-key=***
  #     -> nothing: no cloud is asked for machines
  #   exoscale-instance-profile=large
  #     -> nothing
  #   exoscale-disk-size=50
  #     -> disk of the pool; all disks are on this host
  # [runners.machine] MachineDriver = "exoscale"
  #   -> Workers are VMs on this host; no cloud is asked for machines.
  # [runners.machine] MachineName = "gitlab-ci-%s"
  #   -> Workers are named after their pool.
}

runner "ci" {
  pool  = pool.ci
  url   = "http://gitlab.internal:8080/"
  token = file("/run/secrets/ci-token")
  # It takes the place of docker+machine: each job is a container in a VM of this host.
  executor = "docker-autoscaler"

  capacity_per_instance = 1
  max_use_count         = 0 # no limit, as in the source; 1 gives each job a fresh VM

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
  cpus          = 2 # the source does not say: write what a job needs
  memory        = "4GiB"
  disk          = "30GiB" # the source does not say: write what a job needs
  start         = "cold"
  max_instances = 1
  # [runners.machine] IdleCount = 0
  #   -> The executor shell does not use it.
}

runner "plain" {
  pool  = pool.plain
  url   = "http://gitlab.internal:8080/"
  token = file("/run/secrets/plain-token")
  # It takes the place of shell: jobs run in a VM's shell and find there what its image has, not what the host
  # has.
  executor = "instance"

  capacity_per_instance = 1
  max_use_count         = 1
}
