# Written by fleetingd convert from config.toml. What has no place in a spec stands beside where it would be,
# in comments that begin with its table: read each of them, since jobs may need what it says.
#
# The secrets are not in here. Put each into the file that stands for it below, readable by root alone. For
# all of them at once:
#   fleetingd convert config.toml --secrets-dir /etc/fleetingd/secrets -o host.hcl

host "ci-01" {
  egress_interface = "eno1" # the interface of the default route (ip route show default)

  gitlab_runner {
    concurrent = 50
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

pool "hetzner-docker-autoscaler" {
  image         = image.docker
  cpus          = 8 # server-type=cpx42
  memory        = "16GiB"
  disk          = "30GiB" # the source does not say: write what a job needs
  start         = "cold"
  max_instances = 5
  # [runners.autoscaler.plugin_config]
  #   image = "debian-12"
  #   location = "hel1"
  #   name = "hetzner-docker-autoscaler"
  #   private_networks = []
  #   server_type = "cpx42"
  #   token = "***"
  #   user_data = "#cloud-config\npackage_update: true\npackages:\n  - docker-ce\nchpasswd: { list: \"root:x\", *** }\n"
  #   -> It is for another plugin, which starts machines elsewhere.
}

# The source calls it "hetzner docker autoscaler".
runner "hetzner-docker-autoscaler" {
  pool     = pool.hetzner-docker-autoscaler
  url      = "https://gitlab.com"
  token    = file("/run/secrets/hetzner-docker-autoscaler-token")
  executor = "docker-autoscaler"

  capacity_per_instance = 4
  max_use_count         = 0 # no limit, as in the source; 1 gives each job a fresh VM

  policy {
    idle_count = 0
    idle_time  = "50m"
    periods    = ["* * * * *"]
    timezone   = "Europe/Berlin"
  }

  policy {
    idle_count = 8
    idle_time  = "50m"
    periods    = ["* 7-19 * * 1-5"]
    timezone   = "Europe/Berlin"
  }
  # [runners.autoscaler] plugin = "hetznercloud/fleeting-plugin-hetzner:latest"
  #   -> fleetingd is the plugin, so the workers are VMs on this host.
  # [runners.autoscaler.connector_config] use_external_addr = true
  #   -> A worker is reached over SSH at its own address, as the user of its image and with a key of its own.

  settings = {
    autoscaler = {
      instance_ready_command = "docker info"
    }
    docker = {
      image = "alpine:latest"
    }
  }
}
