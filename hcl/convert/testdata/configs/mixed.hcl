# Written by fleetingd convert from config.toml. Settings that a spec has no place for are in comments where
# they would be. Read each of them: jobs may depend on it.
#
# It holds no secrets. Put each one into the file named below, readable by root only. To write all of them at
# once:
#   fleetingd convert config.toml --secrets-dir /etc/fleetingd/secrets -o host.hcl

host "ci-01" {
  egress_interface = "eno1" # the interface of the default route (ip route show default)

  gitlab_runner {
    check_interval = 0
    concurrent     = 8
    log_format     = "json"
    # unknown_switch = true
    #   -> "unknown_switch" is not a setting of GitLab Runner 19.4. GitLab Runner ignores unknown settings.
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

pool "builder" {
  image         = image.docker
  cpus          = 2 # not in config.toml: set what jobs need
  memory        = "4GiB"
  disk          = "30GiB" # not in config.toml: set what jobs need
  start         = "cold"
  max_instances = 4
}

runner "builder" {
  pool  = pool.builder
  url   = "https://gitlab.example.com/"
  token = file("/run/secrets/builder-token")
  # Replaces docker: the container of each job now runs in a VM.
  executor = "docker-autoscaler"

  capacity_per_instance = 1
  max_use_count         = 1

  settings = {
    docker = {
      disable_cache                = false
      disable_entrypoint_overwrite = false
      image                        = "node:22"
      network_mtu                  = 0
      oom_kill_disable             = false
      privileged                   = false
      shm_size                     = 300000
      tls_verify                   = false
      volumes                      = ["/cache"]
    }
  }
  # [runners.docker] host = "tcp://127.0.0.1:2375"
  #   -> Jobs use the Docker daemon in their VM.
}

pool "builder-2" {
  image         = image.ubuntu
  cpus          = 2 # not in config.toml: set what jobs need
  memory        = "4GiB"
  disk          = "30GiB" # not in config.toml: set what jobs need
  start         = "cold"
  max_instances = 8
}

# Called "builder" in config.toml.
runner "builder-2" {
  pool  = pool.builder-2
  url   = "https://gitlab.example.com/"
  token = file("/run/secrets/builder-2-token")
  # Replaces shell: jobs run in the shell of a VM, and find the programs of its image instead of the host's.
  executor = "instance"

  capacity_per_instance = 1
  max_use_count         = 1

  settings = {
    # [[runners]]
    #   [docker]
    #     image = "unused"
    #   -> "docker" is for executor = "docker-autoscaler", but this runner has "instance", so GitLab Runner
    #      ignores it.
    environment = ["LC_ALL=C.UTF-8"]
    shell       = "bash"
  }
}

pool "gr-ere-jobs-2" {
  image         = image.docker
  cpus          = 2 # not in config.toml: set what jobs need
  memory        = "4GiB"
  disk          = "30GiB" # not in config.toml: set what jobs need
  start         = "cold"
  max_instances = 2
  # [runners.machine] MachineOptions, and what stands in for them:
  #   generic-ip-address=203.0.113.5
  #     -> nothing: workers are on this host, in the subnet of network
  #   generic-ssh-user=root
  #     -> nothing: each worker has an SSH key of its own, and the user of its image
  # [runners.machine] MachineDriver = "generic"
  #   -> Workers are VMs on this host; no cloud is involved.
  # [runners.machine] MachineName = "x-%s"
  #   -> Workers are named after their pool.
}

# Called "Größere Jobs 2×" in config.toml.
runner "gr-ere-jobs-2" {
  pool  = pool.gr-ere-jobs-2
  url   = "https://gitlab.example.com/"
  token = file("/run/secrets/gr-ere-jobs-2-token")
  # Replaces docker+machine: each job runs in a container, in a VM on this host.
  executor = "docker-autoscaler"

  capacity_per_instance = 1
  max_use_count         = 0 # no limit, as in config.toml; 1 gives each job a fresh VM

  policy {
    idle_count = 0
    idle_time  = "10m"
  }

  settings = {
    docker = {
      image = "node:22"
    }
  }
}

# [[runners]]
#   executor = "kubernetes"
#   name = "cluster"
#   token = "***"
#   url = "https://gitlab.example.com/"
#
#   [kubernetes]
#     bearer_token = "***"
#     image = "alpine:3.20"
#     namespace = "ci"
#     [kubernetes.node_selector]
#       node-role = "ci"
#   -> fleetingd cannot run jobs of the executor "kubernetes". Keep this section in a separate GitLab Runner.
