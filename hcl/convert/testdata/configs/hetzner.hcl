# Written by fleetingd convert from config.toml. Settings that a spec has no place for are in comments where
# they would be. Read each of them: jobs may depend on it.
#
# It holds no secrets. Put each one into the file named below, readable by root only. To write all of them at
# once:
#   fleetingd convert config.toml --secrets-dir /etc/fleetingd/secrets -o host.hcl

host "ci-01" {
  egress_interface = "eno1" # the interface of the default route (ip route show default)

  gitlab_runner {
    check_interval = 0
    concurrent     = 4
    log_level      = "info"
    session_server = {
      advertise_address = "ci.example.net:8093"
      listen_address    = "[::]:8093"
      session_timeout   = 1800
    }
    shutdown_timeout = 0
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

pool "hetzner-autoscale" {
  image         = image.docker
  cpus          = 8 # hetzner-server-type=cpx41
  memory        = "16GiB"
  disk          = "30GiB" # not in config.toml: set what jobs need
  start         = "cold"
  max_instances = 4
  # [runners.machine] MachineOptions, and what stands in for them:
  #   hetzner-api-token=$HETZNER_API_TOKEN
  #     -> nothing: no cloud is involved
  #   hetzner-image=ubuntu-24.04
  #     -> the image block
  #   hetzner-server-type=cpx41
  #     -> cpus and memory of the pool
  #   hetzner-server-location=fsn1
  #     -> nothing: workers are on this host, in the subnet of network
  #   engine-install-url=https://get.docker.com
  #     -> the package docker.io in the image's prebuild
  # [runners.machine] MachineDriver = "hetzner"
  #   -> Workers are VMs on this host; no cloud is involved.
  # [runners.machine] MachineName = "runner-%s"
  #   -> Workers are named after their pool.
}

runner "hetzner-autoscale" {
  pool  = pool.hetzner-autoscale
  url   = "https://gitlab.com/"
  token = file("/run/secrets/hetzner-autoscale-token")
  # Replaces docker+machine: each job runs in a container, in a VM on this host.
  executor = "docker-autoscaler"

  capacity_per_instance = 1
  max_use_count         = 0 # no limit, as in config.toml; 1 gives each job a fresh VM

  policy {
    idle_count = 0
    idle_time  = "20m"
  }

  policy {
    periods    = ["* 8-18 * * mon-fri"]
    timezone   = "UTC"
    idle_count = 2
    idle_time  = "20m"
  }

  settings = {
    cache = {
      MaxUploadedArchiveSize = 0
    }
    docker = {
      disable_cache                = false
      disable_entrypoint_overwrite = false
      image                        = "docker:27-dind"
      oom_kill_disable             = false
      privileged                   = true
      pull_policy                  = ["if-not-present"]
      shm_size                     = 536870912
      tls_verify                   = false
      volumes                      = ["/certs/client", "/cache"]
    }
    id = 4711
  }
}
