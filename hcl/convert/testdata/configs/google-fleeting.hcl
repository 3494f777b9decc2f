# Written by fleetingd convert from config.toml. Settings that a spec has no place for are in comments where
# they would be. Read each of them: jobs may depend on it.
#
# It holds no secrets. Put each one into the file named below, readable by root only. To write all of them at
# once:
#   fleetingd convert config.toml --secrets-dir /etc/fleetingd/secrets -o host.hcl

host "ci-01" {
  egress_interface = "eno1" # the interface of the default route (ip route show default)

  gitlab_runner {
    concurrent = 40
    labels = {
      site = "eu"
    }
    shutdown_timeout = 3600
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

pool "gcp" {
  image         = image.ubuntu
  cpus          = 2 # not in config.toml: set what jobs need
  memory        = "4GiB"
  disk          = "30GiB" # not in config.toml: set what jobs need
  start         = "cold"
  max_instances = 8
  # [runners.autoscaler.plugin_config]
  #   name = "my-instance-group"
  #   project = "example"
  #   zone = "europe-west1-c"
  #   -> This configures another plugin.
}

runner "gcp" {
  pool     = pool.gcp
  url      = "https://gitlab.example.com"
  token    = file("/run/secrets/gcp-token")
  executor = "instance"

  capacity_per_instance = 5
  max_use_count         = 100

  policy {
    idle_count         = 5
    idle_time          = "20m"
    scale_factor       = 0.2
    scale_factor_limit = 20
  }
  # [runners.autoscaler] plugin = "googlecloud:latest"
  #   -> fleetingd is the plugin here: workers are VMs on this host.
  # [runners.autoscaler.connector_config] key_path = "/root/.ssh/id"
  #   -> Workers are reached over SSH at their own address, as the image's user, each with its own key.
  # [runners.autoscaler.connector_config] username = "runner"
  #   -> Workers are reached over SSH at their own address, as the image's user, each with its own key.

  settings = {
    autoscaler = {
      connector_config = {
        timeout = "5m"
      }
    }
    cache = {
      Type = "gcs"
      gcs = {
        AccessID   = "ci@example.iam.gserviceaccount.com"
        BucketName = "cache"
        PrivateKey = file("/run/secrets/gcp-cache-gcs-privatekey") # the value of PrivateKey in config.toml
      }
    }
    # [[runners]]
    #   [docker]
    #     image = ""
    #   -> "docker" is for executor = "docker-autoscaler", but this runner has "instance", so GitLab Runner
    #      ignores it.
    get_sources_timeout = "10m"
    pre_build_script    = <<EOT
set -euo pipefail
for i in 1 2 3; do
  curl -fsS https://example.com/ready && break || sleep "$i"
done
EOT
    shell               = "bash"
  }
}
