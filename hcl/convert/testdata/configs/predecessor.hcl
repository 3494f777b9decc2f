# Written by fleetingd convert from config.toml. Settings that a spec has no place for are in comments where
# they would be. Read each of them: jobs may depend on it.
#
# It holds no secrets. Put each one into the file named below, readable by root only. To write all of them at
# once:
#   fleetingd convert config.toml --secrets-dir /etc/fleetingd/secrets -o host.hcl

host "ci-01" {
  egress_interface = "eth0"
  # [runners.autoscaler.plugin_config] vm_disk_directory = "/tmp/fleetingd"
  #   -> The runner cannot see /tmp/fleetingd: its unit has its own /tmp (PrivateTmp=), and the system cleans
  #      that folder up. Write "/var/lib/fleetingd" or "/srv/fleetingd", for example.

  network {
    subnet = "172.16.120.0/24"
  }

  gitlab_runner {
    concurrent = 10
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
      "#!/bin/sh\napt install -y --no-install-recommends git build-essential",
      "#!/bin/sh\nsu - ubuntu -c \"whoami\"",
      "#!/bin/sh\necho \"{ \\\"features\\\": { \\\"buildkit\\\": true } }\" | tee -a /etc/docker/daemon.json",
    ]
  }
}

pool "metal" {
  image         = image.ubuntu
  cpus          = 8 # vm_num_cpu_cores and vm_memory_mb
  memory        = "16GiB"
  disk          = "30GiB" # vm_disk_size_gb
  start         = "cold"
  max_instances = 10
}

runner "metal" {
  pool     = pool.metal
  url      = "https://gitlab.example.com"
  token    = file("/run/secrets/metal-token")
  executor = "instance"

  capacity_per_instance = 1
  max_use_count         = 1

  policy {
    idle_count = 4
    idle_time  = "5m"
    # [runners.autoscaler.policy] preemtive_mode = true
    #   -> GitLab Runner has no such key in a policy, or not with this value.
  }

  settings = {
    autoscaler = {
      connector_config = {
        keepalive = "1s"
        timeout   = "10s"
      }
    }
    # [[runners]] delete_instances_on_shutdown = true
    #   -> "delete_instances_on_shutdown" is not a setting of a [[runners]] section. Write autoscaler = {
    #      delete_instances_on_shutdown = … }.
    # [[runners]] instance_ready_command = "cloud-init status --wait"
    #   -> "instance_ready_command" is not a setting of a [[runners]] section. Write autoscaler = {
    #      instance_ready_command = … }.
    # [[runners]] plugin = "fleeting-plugin-fleetingd"
    #   -> settings may not have "plugin": fleetingd is the plugin.
    pre_build_script = "echo $CI_REGISTRY_PASSWORD | docker login -u $CI_REGISTRY_USER --password-stdin $CI_REGISTRY"
    shell            = "bash"
  }
}
