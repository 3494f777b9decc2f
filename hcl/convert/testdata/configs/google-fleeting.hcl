# Written by fleetingd convert from config.toml. What has no place in a spec stands beside where it would be,
# in comments that begin with its table: read each of them, since jobs may need what it says.
#
# The secrets are not in here. Put each into the file that stands for it below, readable by root alone. For
# all of them at once:
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
  cpus          = 2 # the source does not say: write what a job needs
  memory        = "4GiB"
  disk          = "30GiB" # the source does not say: write what a job needs
  start         = "cold"
  max_instances = 8
  # [runners.autoscaler.plugin_config]
  #   name = "my-instance-group"
  #   project = "example"
  #   zone = "europe-west1-c"
  #   -> It is for another plugin, which starts machines elsewhere.
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
  #   -> fleetingd is the plugin, so the workers are VMs on this host.
  # [runners.autoscaler.connector_config] key_path = "/root/.ssh/id"
  #   -> A worker is reached over SSH at its own address, as the user of its image and with a key of its own.
  # [runners.autoscaler.connector_config] username = "runner"
  #   -> A worker is reached over SSH at its own address, as the user of its image and with a key of its own.

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
