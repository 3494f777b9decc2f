# Written by fleetingd convert from config.toml. Settings that a spec has no place for are in comments where
# they would be. Read each of them: jobs may depend on it.
#
# It holds no secrets. Put each one into the file named below, readable by root only. To write all of them at
# once:
#   fleetingd convert config.toml --secrets-dir /etc/fleetingd/secrets -o host.hcl

host "ci-01" {
  egress_interface = "eno1" # the interface of the default route (ip route show default)

  gitlab_runner {
    check_interval = 10
    concurrent     = 10
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
    file "/etc/docker/daemon.json" {
      content = jsonencode({ registry-mirrors = ["http://198.51.100.7:5000"], insecure-registries = ["198.51.100.7:5000"] })
    }
  }
}

pool "autoscale" {
  image         = image.docker
  cpus          = 4 # digitalocean-size=s-4vcpu-8gb
  memory        = "8GiB"
  disk          = "30GiB" # not in config.toml: set what jobs need
  start         = "cold"
  max_instances = 6
  # [runners.machine] MachineOptions, and what stands in for them:
  #   digitalocean-image=ubuntu-24-04-x64
  #     -> the image block
  #   digitalocean-ssh-user=root
  #     -> nothing: each worker has an SSH key of its own, and the user of its image
  #   digitalocean-access-token=***
  #     -> nothing: no cloud is involved
  #   digitalocean-region=fra1, digitalocean-private-networking
  #     -> nothing: workers are on this host, in the subnet of network
  #   digitalocean-size=s-4vcpu-8gb
  #     -> cpus and memory of the pool
  #   engine-registry-mirror=http://198.51.100.7:5000, engine-insecure-registry=198.51.100.7:5000
  #     -> /etc/docker/daemon.json in the image's prebuild
  # [runners.machine] MachineDriver = "digitalocean"
  #   -> Workers are VMs on this host; no cloud is involved.
  # [runners.machine] MachineName = "ci-%s"
  #   -> Workers are named after their pool.
}

runner "autoscale" {
  pool  = pool.autoscale
  url   = "https://git.example.org/ci"
  token = file("/run/secrets/autoscale-token")
  # Replaces docker+machine: each job runs in a container, in a VM on this host.
  executor = "docker-autoscaler"

  capacity_per_instance = 1
  max_use_count         = 100

  policy {
    idle_count = 2
    idle_time  = "30m"
  }

  policy {
    periods    = ["* 0-8,20-23 * * mon-fri", "* * * * sat,sun"]
    timezone   = "America/Sao_Paulo"
    idle_count = 0
    idle_time  = "20m"
  }

  settings = {
    cache = {
      # [runners.cache] AccessKey = "***"
      #   -> "cache.AccessKey" is not a setting of "cache". Write cache = { s3 = { AccessKey = … } }.
      # [runners.cache] BucketName = "runner"
      #   -> "cache.BucketName" is not a setting of "cache". Write cache = { gcs = { BucketName = … } } or cache =
      #      { s3 = { BucketName = … } }.
      # [runners.cache] Insecure = true
      #   -> "cache.Insecure" is not a setting of "cache". Write cache = { s3 = { Insecure = … } }.
      # [runners.cache] SecretKey = "***"
      #   -> "cache.SecretKey" is not a setting of "cache". Write cache = { s3 = { SecretKey = … } }.
      # [runners.cache] ServerAddress = "198.51.100.7:9005"
      #   -> "cache.ServerAddress" is not a setting of "cache". Write cache = { s3 = { ServerAddress = … } }.
      Shared = true
      Type   = "s3"
    }
    docker = {
      disable_cache = false
      image         = "alpine:3.20"
      privileged    = false
      shm_size      = 0
      tls_verify    = false
      volumes       = ["/cache"]
    }
  }
}
