# Written by fleetingd convert from config.toml. Settings that a spec has no place for are in comments where
# they would be. Read each of them: jobs may depend on it.
#
# It holds no secrets. Put each one into the file named below, readable by root only. To write all of them at
# once:
#   fleetingd convert config.toml --secrets-dir /etc/fleetingd/secrets -o host.hcl

host "ci-01" {
  egress_interface = "eno1" # the interface of the default route (ip route show default)

  gitlab_runner {
    check_interval = 3
    concurrent     = 8
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

pool "openstack" {
  image         = image.docker
  cpus          = 4 # openstack-flavor-name=m1.large
  memory        = "8GiB"
  disk          = "30GiB" # not in config.toml: set what jobs need
  start         = "cold"
  max_instances = 10
  # [runners.machine] MachineOptions, and what stands in for them:
  #   openstack-auth-url=https://openstack.example.edu:5000/v3, openstack-username=gitlab-runner,
  #   openstack-password=***, openstack-tenant-id=123456, openstack-domain-name=default,
  #   openstack-application-credential-secret=***
  #     -> nothing: no cloud is involved
  #   openstack-image-id=00000000-0000-0000-0000-000000000000
  #     -> the image block
  #   openstack-flavor-name=m1.large
  #     -> cpus and memory of the pool
  #   openstack-net-id=00000000-0000-0000-0000-000000000001
  #     -> nothing: workers are on this host, in the subnet of network
  #   openstack-ssh-user=core, openstack-keypair-name=runners, openstack-private-key-file=/etc/gitlab-runner/key
  #     -> nothing: each worker has an SSH key of its own, and the user of its image
  #   openstack-sec-groups=Internal
  #     -> egress blocks in network; nothing reaches a worker from outside
  #   openstack-user-data-file=/etc/gitlab-runner/ignition.json
  #     -> run, packages and file in the image's prebuild
  #   openstack-active-timeout=300
  #     -> nothing: it only concerns cloud machines
  #   engine-storage-driver=overlay2
  #     -> not converted: write it to /etc/docker/daemon.json in the image's prebuild
  # [runners.machine] MachineDriver = "openstack"
  #   -> Workers are VMs on this host; no cloud is involved.
  # [runners.machine] MachineName = "auto-scale-%s"
  #   -> Workers are named after their pool.
  # [runners.machine] MaxGrowthRate = 2
  #   -> Workers are cloned on this host, as many at once as needed. To slow that down, write autoscaler = {
  #      scale_throttle = { limit = …, burst = … } } in settings.
}

runner "openstack" {
  pool  = pool.openstack
  url   = "https://gitlab.example.edu"
  token = file("/run/secrets/openstack-token")
  # Replaces docker+machine: each job runs in a container, in a VM on this host.
  executor = "docker-autoscaler"

  capacity_per_instance = 1
  max_use_count         = 5

  policy {
    idle_count = 2
    idle_time  = "1h"
  }

  settings = {
    builds_dir = "/builds"
    cache_dir  = "/cache"
    clone_url  = file("/run/secrets/openstack-clone-url") # the value of clone_url in config.toml
    docker = {
      allowed_images = ["registry.example.edu/*:*", "python:*"]
      extra_hosts    = ["gitlab.example.edu:203.0.113.10"]
      image          = "python:3.12"
      privileged     = true
      sysctls = {
        "net.ipv4.ip_forward" = "1"
      }
      volumes = ["/cache", "/var/run/docker.sock:/var/run/docker.sock"]
    }
    shell       = "bash"
    tls-ca-file = "/etc/gitlab-runner/certs/ca.pem"
  }
}
