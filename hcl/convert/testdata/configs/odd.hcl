# Written by fleetingd convert from config.toml. Settings that a spec has no place for are in comments where
# they would be. Read each of them: jobs may depend on it.
#
# It holds no secrets. Put each one into the file named below, readable by root only. To write all of them at
# once:
#   fleetingd convert config.toml --secrets-dir /etc/fleetingd/secrets -o host.hcl

host "ci-01" {
  egress_interface = "eno1" # the interface of the default route (ip route show default)

  gitlab_runner {
    concurrent = 3
    # listen_address = 9252
    #   -> "listen_address" must be a string; got the number 9252. Write listen_address = ":9252"
    # log_level = "loud"
    #   -> "log_level" must be one of "debug", "info", "warn", "error", "fatal", "panic", "trace" and "warning";
    #      got "loud".
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

pool "odd-name-if" {
  image         = image.docker
  cpus          = 2 # not in config.toml: set what jobs need
  memory        = "4GiB"
  disk          = "30GiB" # not in config.toml: set what jobs need
  start         = "cold"
  max_instances = 2
  # [runners.machine] IdleColour = "green"
  #   -> GitLab Runner has no such key there.
  # [runners.machine] MachineDriver = "amazonec2"
  #   -> Workers are VMs on this host; no cloud is involved.
  # [runners.machine] MachineName = "x-%s"
  #   -> Workers are named after their pool.
  # [runners.machine]
  #   [MachineOptions]
  #     amazonec2-instance-type = "m5.large"
  #     amazonec2-secret-key = "***"
  #   -> GitLab Runner has no such key there.
  # [runners.machine] MaxBuilds = "ten"
  #   -> MaxBuilds must be a whole number.
}

# Called "${odd} \"name\" %{ if }" in config.toml.
runner "odd-name-if" {
  pool  = pool.odd-name-if
  url   = "https://gitlab.example.com"
  token = file("/run/secrets/odd-name-if-token")
  # Replaces docker+machine: each job runs in a container, in a VM on this host.
  executor = "docker-autoscaler"

  capacity_per_instance = 1
  max_use_count         = 0 # no limit, as in config.toml; 1 gives each job a fresh VM

  policy {
    # [runners.machine] IdleCount = -1
    #   -> idle_count must be between 0 and 1048576; got -1.
    idle_time = "10m"
  }

  # [runners.machine.autoscaling]
  #   IdleCount = 2
  #   IdleTime = 60
  #   Periods = ["@daily"]
  #   -> "@daily": a period is five fields, not an @word: write "* 8-18 * * mon-fri", for example.

  # [runners.machine.autoscaling]
  #   IdleCount = 2
  #   IdleTime = 60
  #   Periods = ["30 * * * * * *"]
  #   Timezone = "UTC"
  #   -> "30 * * * * * *": a period has 5 fields (minute, hour, day of the month, month, day of the week); this
  #      has 7: write "* 8-18 * * mon-fri", for example.

  # [runners.machine.autoscaling]
  #   IdleCount = 1
  #   IdleTime = 60
  #   Periods = ["* * 8-18 * * mon-fri *"]
  #   Timezone = "europe/berlin"
  #   -> "europe/berlin" is not a time zone. Did you mean "Europe/Berlin".

  policy {
    periods    = ["* 9-17 * * 1-5"]
    idle_count = 2
    idle_time  = "0s"
  }

  settings = {
    # [[runners]] build_dir = "/builds"
    #   -> "build_dir" is not a setting of GitLab Runner 19.4; did you mean "builds_dir"? GitLab Runner ignores
    #      unknown settings.
    docker = {
      # [runners.docker] cpus = 2
      #   -> "docker.cpus" must be a string; got the number 2. Write cpus = "2"
      devices = [
        "/dev/kvm",
        "/dev/null",
        "/dev/net/tun",
        "/dev/vhost-net",
        "/dev/fuse",
        "/dev/dri/renderD128",
      ]
      dns   = []
      image = "alpine"
      log_options = {
        "for"        = "x"
        "true"       = "y"
        "with space" = "z"
      }
      memory  = "2g"
      volumes = ["/cache", "C:\\cache:C:\\cache"]
    }
    environment = [
      "GREETING=$${HOME} %%{x}",
      # [[runners]] environment = ["NO_EQUALS_SIGN"]
      #   -> "environment[1]" must be NAME=value; got "NO_EQUALS_SIGN".
      "DB_PASSWORD=$CI_DB_PASSWORD",
    ]
    feature_flags = {
      # [runners.feature_flags] FF_NO_SUCH_FLAG = true
      #   -> "FF_NO_SUCH_FLAG" is not a feature flag of GitLab Runner 19.4. GitLab Runner ignores unknown ones.
      FF_USE_FASTZIP = true
    }
    post_build_script = file("/run/secrets/odd-name-if-post-build-script") # the value of post_build_script in config.toml
    pre_build_script  = <<EOT
set -eu
if [ -n "$${CI:-}" ]; then
  echo "100 %%{done}"
fi
EOT
    # [[runners]] tags = ["docker"]
    #   -> settings may not have "tags": it is set in GitLab, where the runner was created.
  }
}
