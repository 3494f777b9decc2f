# Written by fleetingd convert from config.toml. Settings that a spec has no place for are in comments where
# they would be. Read each of them: jobs may depend on it.
#
# It holds no secrets. Put each one into the file named below, readable by root only. To write all of them at
# once:
#   fleetingd convert config.toml --secrets-dir /etc/fleetingd/secrets -o host.hcl

host "ci-01" {
  egress_interface = "enp1s0"
  state_dir        = "/srv/fleetingd"

  network {
    subnet = "10.77.0.0/24"
  }

  gitlab_runner {
    check_interval   = 3
    concurrent       = 24
    shutdown_timeout = 600
  }
}

image "ubuntu" {
  ubuntu {
    release = "noble"
  }

  prebuild {
    packages = ["ca-certificates", "curl"]
    run = [
      "DEBIAN_FRONTEND=noninteractive apt-get -y upgrade",
      "curl -fsSL \"https://packages.gitlab.com/install/repositories/runner/gitlab-runner/script.deb.sh\" | os=ubuntu dist=noble bash",
      "DEBIAN_FRONTEND=noninteractive apt-get -y install gitlab-runner",
      "#!/bin/sh\ncurl -fsSL https://get.docker.com | sh",
      "#!/bin/sh\nusermod -aG docker ubuntu",
      "sh /root/fleetingd-step-6 && rm /root/fleetingd-step-6", # contains a secret
    ]
    file "/root/fleetingd-step-6" { # read when the image is built; every job can read what the step leaves in the image
      content = file("/run/secrets/image-ubuntu-step-6")
      mode    = "0600"
    }
  }
}

image "ubuntu-2" {
  ubuntu {
    release = "noble"
  }

  prebuild {
    packages = ["ca-certificates", "curl"]
    run = [
      "DEBIAN_FRONTEND=noninteractive apt-get -y upgrade",
      "curl -fsSL \"https://packages.gitlab.com/install/repositories/runner/gitlab-runner/script.deb.sh\" | os=ubuntu dist=noble bash",
      "DEBIAN_FRONTEND=noninteractive apt-get -y install gitlab-runner",
    ]
  }
}

pool "build" {
  image         = image.ubuntu
  cpus          = 4 # vm_num_cpu_cores and vm_memory_mb
  memory        = "8000MiB"
  disk          = "60GiB" # vm_disk_size_gb
  start         = "cold"
  console       = true
  max_instances = 10
}

runner "build" {
  pool     = pool.build
  url      = "https://gitlab.example.com"
  token    = file("/run/secrets/build-token")
  executor = "docker-autoscaler"

  capacity_per_instance = 2
  max_use_count         = 10

  policy {
    idle_count         = 2
    idle_time          = "20m"
    preemptive_mode    = false
    scale_factor       = 0.5
    scale_factor_limit = 6
  }

  policy {
    idle_count = 6
    idle_time  = "30m"
    periods    = ["* 8-18 * * mon-fri", "0-30 7 * * 1-5"]
    timezone   = "Europe/Berlin"
  }
  # [runners.autoscaler] instance_ready_command = "cloud-init status --wait || test $? -eq 2"
  #   -> Not needed: a worker counts as running only once it is ready.
  # [runners.autoscaler.connector_config] use_external_addr = true
  #   -> Workers are reached over SSH at their own address, as the image's user, each with its own key.
  # [runners.autoscaler.state_storage] dir = "/var/lib/gitlab-runner/state"
  #   -> fleetingd chooses this folder.

  settings = {
    autoscaler = {
      delete_instances_on_shutdown = true
      state_storage = {
        enabled                         = true
        keep_instance_with_acquisitions = false
      }
      update_interval                = "10s"
      update_interval_when_expecting = "1s"
    }
    docker = {
      image      = "debian:stable-slim"
      privileged = true
      volumes    = ["/cache", "/var/run/docker.sock:/var/run/docker.sock"]
    }
    id = 3
  }
}

pool "deploy" {
  image         = image.ubuntu-2
  cpus          = 2 # vm_num_cpu_cores and vm_memory_mb
  memory        = "4GiB"
  disk          = "20GiB" # vm_disk_size_gb
  start         = "cold"
  max_instances = 4
  # [runners.autoscaler.plugin_config] vm_disk_directory = "/srv/fleetingd-deploy"
  #   -> All runners of a host share its state_dir.
  # [runners.autoscaler.plugin_config] vm_subnet = "10.77.1.0/24"
  #   -> All runners of a host share its subnet.
}

runner "deploy" {
  pool     = pool.deploy
  url      = "https://gitlab.example.com"
  token    = file("/run/secrets/deploy-token")
  executor = "instance"

  capacity_per_instance = 1
  max_use_count         = 1

  settings = {
    environment = [
      "HTTP_PROXY=${file("/run/secrets/deploy-environment-http-proxy")}",     # the value that HTTP_PROXY has in config.toml
      "DEPLOY_TOKEN=${file("/run/secrets/deploy-environment-deploy-token")}", # the value that DEPLOY_TOKEN has in config.toml
    ]
    id = 4
  }
}
