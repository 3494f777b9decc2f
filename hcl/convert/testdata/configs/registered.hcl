# Written by fleetingd convert from config.toml. Settings that a spec has no place for are in comments where
# they would be. Read each of them: jobs may depend on it.
#
# It holds no secrets. Put each one into the file named below, readable by root only. To write all of them at
# once:
#   fleetingd convert config.toml --secrets-dir /etc/fleetingd/secrets -o host.hcl

host "ci-01" {
  egress_interface = "eno1" # the interface of the default route (ip route show default)

  gitlab_runner {
    check_interval     = 0
    concurrent         = 1
    connection_max_age = "15m0s"
    session_server = {
      session_timeout = 1800
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

pool "host-example-com" {
  image         = image.docker
  cpus          = 2 # not in config.toml: set what jobs need
  memory        = "4GiB"
  disk          = "30GiB" # not in config.toml: set what jobs need
  start         = "cold"
  max_instances = 1
}

# Called "host.example.com" in config.toml.
runner "host-example-com" {
  pool  = pool.host-example-com
  url   = "https://gitlab.com/"
  token = file("/run/secrets/host-example-com-token")
  # Replaces docker: the container of each job now runs in a VM.
  executor = "docker-autoscaler"

  capacity_per_instance = 1
  max_use_count         = 1
  # [[runners]] token_obtained_at = 2024-11-25T11:49:46Z
  #   -> GitLab Runner records this itself when it renews a token.
  # [[runners]] token_expires_at = 0001-01-01T00:00:00Z
  #   -> GitLab Runner records this itself when it renews a token.

  settings = {
    cache = {
      MaxUploadedArchiveSize = 0
    }
    docker = {
      disable_cache                = false
      disable_entrypoint_overwrite = false
      image                        = "alpine:latest"
      network_mtu                  = 0
      oom_kill_disable             = false
      privileged                   = false
      shm_size                     = 0
      tls_verify                   = false
      volumes                      = ["/cache"]
    }
    id = 25917
  }
}
