# Written by fleetingd convert from config.toml. Settings that a spec has no place for are in comments where
# they would be. Read each of them: jobs may depend on it.
#
# It holds no secrets. Put each one into the file named below, readable by root only. To write all of them at
# once:
#   fleetingd convert config.toml --secrets-dir /etc/fleetingd/secrets -o host.hcl

host "ci-01" {
  egress_interface = "eno1" # the interface of the default route (ip route show default)

  gitlab_runner {
    check_interval = 1
    concurrent     = 1500
    listen_address = ":9402"
    log_level      = "warning"
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

pool "docker-auto-scale" {
  image         = image.docker
  cpus          = 1 # google-machine-type=n1-standard-1
  memory        = "4GiB"
  disk          = "25GiB" # google-disk-size=25
  start         = "cold"
  max_instances = 1000 # limit and concurrent in config.toml would allow 2200
  # [runners.machine] MachineOptions, and what stands in for them:
  #   google-project=example-ci, google-username=core,
  #   google-service-account=ci@example-ci.iam.gserviceaccount.com
  #     -> nothing: no cloud is involved
  #   google-disk-size=25, google-disk-type=pd-ssd
  #     -> disk of the pool; all disks are on this host
  #   google-machine-type=n1-standard-1
  #     -> cpus and memory of the pool
  #   google-tags=ci,shared, google-operation-backoff-initial-interval=2
  #     -> nothing: it only concerns cloud machines
  #   google-use-internal-ip, google-zone=us-east1-d
  #     -> nothing: workers are on this host, in the subnet of network
  #   google-preemptible=true
  #     -> nothing: a worker costs no money
  #   engine-opt=mtu=1460, engine-opt=ipv6
  #     -> not converted: write it to /etc/docker/daemon.json in the image's prebuild
  #   google-machine-image=example-ci/global/images/ci
  #     -> the image block
  # [runners.machine] MachineDriver = "google"
  #   -> Workers are VMs on this host; no cloud is involved.
  # [runners.machine] MachineName = "shared-%s"
  #   -> Workers are named after their pool.
}

runner "docker-auto-scale" {
  pool  = pool.docker-auto-scale
  url   = "https://gitlab.com/"
  token = file("/run/secrets/docker-auto-scale-token")
  # Replaces docker+machine: each job runs in a container, in a VM on this host.
  executor = "docker-autoscaler"

  capacity_per_instance = 1
  max_use_count         = 1

  policy {
    idle_count         = 10
    scale_factor       = 1.1
    scale_factor_limit = 50
    idle_time          = "1h"
  }

  policy {
    periods    = ["* * * * sat,sun"]
    timezone   = "UTC"
    idle_count = 70
    idle_time  = "1h"
  }

  policy {
    periods    = ["30-59 3 * * *", "0-30 4 * * *"]
    timezone   = "UTC"
    idle_count = 700
    idle_time  = "1h"
  }

  policy {
    periods            = ["* 22-23 * * 0-4"]
    idle_count         = 1
    scale_factor       = 0.5
    scale_factor_limit = 20
    idle_time          = "1m30s"
  }

  # GitLab Runner has renamed pre_clone_script to pre_get_sources_script.
  settings = {
    cache = {
      Path   = "runner"
      Shared = true
      Type   = "gcs"
      gcs = {
        BucketName      = "example-ci-cache"
        CredentialsFile = "/etc/gitlab-runner/service-account.json"
      }
    }
    docker = {
      image      = "ruby:3.3"
      privileged = true
      volumes    = ["/certs/client", "/dummy-sys-class-dmi-id:/sys/class/dmi/id:ro"]
    }
    environment = [
      "DOCKER_DRIVER=overlay2",
      "DOCKER_TLS_CERTDIR=",
    ]
    feature_flags = {
      FF_NETWORK_PER_BUILD = true
      FF_USE_FASTZIP       = true
    }
    pre_get_sources_script = "eval \"$CI_PRE_CLONE_SCRIPT\""
    request_concurrency    = 500
  }
}
