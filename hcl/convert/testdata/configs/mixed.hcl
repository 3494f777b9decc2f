# Written by fleetingd convert from config.toml. What has no place in a spec stands beside where it would be,
# in comments that begin with its table: read each of them, since jobs may need what it says.
#
# The secrets are not in here. Put each into the file that stands for it below, readable by root alone. For
# all of them at once:
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
  cpus          = 2 # the source does not say: write what a job needs
  memory        = "4GiB"
  disk          = "30GiB" # the source does not say: write what a job needs
  start         = "cold"
  max_instances = 4
}

runner "builder" {
  pool  = pool.builder
  url   = "https://gitlab.example.com/"
  token = file("/run/secrets/builder-token")
  # It takes the place of docker: the container of each job now runs in a VM of its own.
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
  cpus          = 2 # the source does not say: write what a job needs
  memory        = "4GiB"
  disk          = "30GiB" # the source does not say: write what a job needs
  start         = "cold"
  max_instances = 8
}

# The source calls it "builder".
runner "builder-2" {
  pool  = pool.builder-2
  url   = "https://gitlab.example.com/"
  token = file("/run/secrets/builder-2-token")
  # It takes the place of shell: jobs run in a VM's shell and find there what its image has, not what the host
  # has.
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
  cpus          = 2 # the source does not say: write what a job needs
  memory        = "4GiB"
  disk          = "30GiB" # the source does not say: write what a job needs
  start         = "cold"
  max_instances = 2
  # [runners.machine] MachineOptions, and what stands in for them:
  #   generic-ip-address=203.0.113.5
  #     -> nothing: workers are on this host, in the subnet of network
  #   generic-ssh-user=root
  #     -> nothing: each worker has an SSH key of its own, and the user of its image
  # [runners.machine] MachineDriver = "generic"
  #   -> Workers are VMs on this host; no cloud is asked for machines.
  # [runners.machine] MachineName = "x-%s"
  #   -> Workers are named after their pool.
}

# The source calls it "Größere Jobs 2×".
runner "gr-ere-jobs-2" {
  pool  = pool.gr-ere-jobs-2
  url   = "https://gitlab.example.com/"
  token = file("/run/secrets/gr-ere-jobs-2-token")
  # It takes the place of docker+machine: each job is a container in a VM of this host.
  executor = "docker-autoscaler"

  capacity_per_instance = 1
  max_use_count         = 0 # no limit, as in the source; 1 gives each job a fresh VM

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
#   -> The executor "kubernetes" does not run jobs in VMs of this host. Keep this section in a GitLab Runner
#      of its own.
