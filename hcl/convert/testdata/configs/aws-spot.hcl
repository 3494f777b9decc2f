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
    concurrent         = 12
    connection_max_age = "15m0s"
    listen_address     = "0.0.0.0:9252"
    log_format         = "json"
    sentry_dsn         = file("/run/secrets/gitlab-runner-sentry-dsn") # the value of sentry_dsn in config.toml
    session_server = {
      session_timeout = 1800
    }
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
      content = jsonencode({ registry-mirrors = ["https://mirror.example.com"] })
    }
  }
}

pool "eu-west-spot-runner-prod" {
  image         = image.docker
  cpus          = 2 # amazonec2-instance-type=m5.large
  memory        = "8GiB"
  disk          = "50GiB" # amazonec2-root-size=50
  start         = "cold"
  max_instances = 15
  # [runners.machine] MachineOptions, and what stands in for them:
  #   amazonec2-instance-type=m5.large
  #     -> cpus and memory of the pool
  #   amazonec2-region=eu-west-1, amazonec2-zone=a, amazonec2-vpc-id=vpc-0123, amazonec2-subnet-id=subnet-0123,
  #   amazonec2-private-address-only=true
  #     -> nothing: workers are on this host, in the subnet of network
  #   amazonec2-request-spot-instance=true, amazonec2-spot-price=0.06
  #     -> nothing: a worker costs no money
  #   amazonec2-security-group=ci
  #     -> egress blocks in network; nothing reaches a worker from outside
  #   amazonec2-tags=Name,ci,Environment,prod, amazonec2-monitoring=true
  #     -> nothing: it only concerns cloud machines
  #   amazonec2-iam-instance-profile=ci, amazonec2-access-key=***, amazonec2-secret-key=***
  #     -> nothing: no cloud is involved
  #   amazonec2-root-size=50
  #     -> disk of the pool; all disks are on this host
  #   amazonec2-ami=ami-0123
  #     -> the image block
  #   amazonec2-userdata=/etc/gitlab-runner/user-data.sh
  #     -> run, packages and file in the image's prebuild
  #   engine-registry-mirror=https://mirror.example.com
  #     -> /etc/docker/daemon.json in the image's prebuild
  # [runners.machine] MachineDriver = "amazonec2"
  #   -> Workers are VMs on this host; no cloud is involved.
  # [runners.machine] MachineName = "ci-%s"
  #   -> Workers are named after their pool.
  # [runners.machine] MaxGrowthRate = 5
  #   -> Workers are cloned on this host, as many at once as needed. To slow that down, write autoscaler = {
  #      scale_throttle = { limit = …, burst = … } } in settings.
}

# Called "eu-west spot runner (prod)" in config.toml.
runner "eu-west-spot-runner-prod" {
  pool  = pool.eu-west-spot-runner-prod
  url   = "https://gitlab.example.com"
  token = file("/run/secrets/eu-west-spot-runner-prod-token")
  # Replaces docker+machine: each job runs in a container, in a VM on this host.
  executor = "docker-autoscaler"

  capacity_per_instance = 1
  max_use_count         = 1

  policy {
    idle_count = 0
    idle_time  = "10m"
  }

  policy {
    periods    = ["* 8-17 * * mon-fri"]
    timezone   = "Europe/Berlin"
    idle_count = 3
    idle_time  = "30m"
  }

  policy {
    periods    = ["* * * * sat,sun"]
    timezone   = "Europe/Berlin"
    idle_count = 0
    idle_time  = "5m"
  }
  # [[runners]] token_obtained_at = 2025-06-17T13:05:47Z
  #   -> GitLab Runner records this itself when it renews a token.
  # [[runners]] token_expires_at = 0001-01-01T00:00:00Z
  #   -> GitLab Runner records this itself when it renews a token.

  # GitLab Runner has renamed pre_clone_script to pre_get_sources_script.
  settings = {
    cache = {
      Shared = false
      Type   = "s3"
      s3 = {
        AccessKey      = file("/run/secrets/eu-west-spot-runner-prod-cache-s3-accesskey") # the value of AccessKey in config.toml
        BucketLocation = "eu-west-1"
        BucketName     = "ci-cache-example"
        Insecure       = false
        SecretKey      = file("/run/secrets/eu-west-spot-runner-prod-cache-s3-secretkey") # the value of SecretKey in config.toml
        ServerAddress  = "s3.amazonaws.com"
      }
    }
    docker = {
      disable_cache             = false
      helper_image              = ""
      image                     = "docker:27"
      privileged                = true
      pull_policy               = "always"
      runtime                   = ""
      shm_size                  = 0
      tls_verify                = false
      volumes                   = ["/cache", "/certs/client"]
      wait_for_services_timeout = 60
    }
    environment = [
      "DOCKER_DRIVER=overlay2",
      "DOCKER_TLS_CERTDIR=",
      "AWS_SECRET_ACCESS_KEY=${file("/run/secrets/eu-west-spot-runner-prod-environment-aws-secret-access-key")}", # the value that AWS_SECRET_ACCESS_KEY has in config.toml
    ]
    id                     = 17
    limit                  = 20
    output_limit           = 4096
    post_build_script      = ""
    pre_build_script       = ""
    pre_get_sources_script = "git config --global http.version HTTP/1.1"
    request_concurrency    = 1
  }
}
