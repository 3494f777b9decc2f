# Written by fleetingd convert from config.toml. Settings that a spec has no place for are in comments where
# they would be. Read each of them: jobs may depend on it.
#
# It holds no secrets. Put each one into the file named below, readable by root only. To write all of them at
# once:
#   fleetingd convert config.toml --secrets-dir /etc/fleetingd/secrets -o host.hcl

host "ci-01" {
  egress_interface = "eno1" # the interface of the default route (ip route show default)

  gitlab_runner {
    concurrent = 6
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

pool "azure" {
  image         = image.docker
  cpus          = 4 # azure-size=Standard_D4s_v3
  memory        = "16GiB"
  disk          = "30GiB" # not in config.toml: set what jobs need
  start         = "cold"
  max_instances = 5
  # [runners.machine] MachineOptions, and what stands in for them:
  #   azure-subscription-id=00000000-0000-0000-0000-000000000002,
  #   azure-client-id=00000000-0000-0000-0000-000000000003, azure-client-secret=***
  #     -> nothing: no cloud is involved
  #   azure-location=westeurope, azure-subnet-prefix=10.0.0.0/24, azure-use-private-ip=true
  #     -> nothing: workers are on this host, in the subnet of network
  #   azure-size=Standard_D4s_v3
  #     -> cpus and memory of the pool
  #   azure-image=canonical:ubuntu-24_04-lts:server:latest
  #     -> the image block
  #   azure-vnet=ci, azure-storage-type=Premium_LRS
  #     -> nothing
  #   azure-open-port=2376
  #     -> egress blocks in network; nothing reaches a worker from outside
  # [runners.machine] MachineDriver = "azure"
  #   -> Workers are VMs on this host; no cloud is involved.
  # [runners.machine] MachineName = "azure-%s"
  #   -> Workers are named after their pool.
}

runner "azure" {
  pool  = pool.azure
  url   = "https://gitlab.example.com"
  token = file("/run/secrets/azure-token")
  # Replaces docker+machine: each job runs in a container, in a VM on this host.
  executor = "docker-autoscaler"

  capacity_per_instance = 1
  max_use_count         = 20

  policy {
    idle_count = 1
    idle_time  = "15m"
  }

  settings = {
    cache = {
      Type = "azure"
      azure = {
        AccountKey    = file("/run/secrets/azure-cache-azure-accountkey") # the value of AccountKey in config.toml
        AccountName   = "cicache"
        ContainerName = "runner"
        StorageDomain = "blob.core.windows.net"
      }
    }
    docker = {
      image = "mcr.microsoft.com/dotnet/sdk:8.0"
    }
  }
}
