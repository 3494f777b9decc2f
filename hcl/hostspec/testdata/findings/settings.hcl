# config.toml's settings: types, places, spelling. What is fine has no comment.
host "metal-01" {
  egress_interface = "eno1"
}

image "ubuntu" {
  user = "ci"
  ubuntu {
    release = "noble"
  }
}

pool "a" {
  image         = image.ubuntu
  cpus          = 1
  memory        = "1GiB"
  disk          = "5GiB"
  max_instances = 4
}

pool "b" {
  image         = image.ubuntu
  cpus          = 1
  memory        = "1GiB"
  disk          = "5GiB"
  max_instances = 4
}

runner "types" {
  pool     = pool.a
  url      = "https://gitlab.example.com"
  token    = env("TOKEN")
  executor = "docker-autoscaler"
  settings = {
    id                = 42
    limit             = "10"             # ERROR: "limit" must be a whole number; got the string "10". Write limit = 10
    output_limit      = 4096.5           # ERROR: "output_limit" must be a whole number; got the number 4096.5. Write output_limit = 10, for example.
    request_concurrency = true           # ERROR: "request_concurrency" must be a whole number; got the boolean true
    environment       = "FOO=bar"        # ERROR: "environment" must be a list; got the string "FOO=bar". Write environment = ["FOO=bar"]
    pre_build_script  = ["a", "b"]       # ERROR: "pre_build_script" must be a string; got a list. Write pre_build_script = join("\n", [ … ]).
    post_build_script = { a = "b" }      # ERROR: "post_build_script" must be a string; got a table
    builds_dir        = 5                # ERROR: "builds_dir" must be a string; got the number 5. Write builds_dir = "5"
    shell             = "zsh"            # ERROR: "shell" must be one of "bash", "sh", "pwsh", "powershell" and "cmd"; got "zsh"
    debug_trace_disabled = "yes"         # ERROR: "debug_trace_disabled" must be true or false; got the string "yes". Write debug_trace_disabled = true or false.
    clean_git_config  = 1                # ERROR: "clean_git_config" must be true or false; got the number 1
    prepare_timeout   = 300              # ERROR: "prepare_timeout" must be a duration with a unit; got 300, which GitLab Runner reads as nanoseconds. Write prepare_timeout = "300s"
    get_sources_timeout = 90000000000    # ERROR: got 90000000000, which GitLab Runner reads as nanoseconds. Write get_sources_timeout = "1m30s"
    unhealthy_interval = "120"           # ERROR: must be a duration with a unit; got the string "120". Write unhealthy_interval = "120s"
    feature_flags     = {
      FF_NETWORK_PER_BUILD = "true"      # ERROR: "feature_flags.FF_NETWORK_PER_BUILD" must be true or false; got the string "true". Write FF_NETWORK_PER_BUILD = true
      FF_NETWORK_PER_BUILDS = true       # WARNING: "FF_NETWORK_PER_BUILDS" is not a feature flag of GitLab Runner 19.4 (did you mean "FF_NETWORK_PER_BUILD"?)
      FF_USE_FASTZIP = false
    }
    docker = {
      image       = "alpine:3"
      volumes     = "/cache"             # ERROR: "docker.volumes" must be a list; got the string "/cache". Write volumes = ["/cache"]
      privileged  = "true"               # ERROR: "docker.privileged" must be true or false; got the string "true". Write privileged = true
      memory      = 512                  # ERROR: "docker.memory" must be a string; got the number 512. Write memory = "512"
      shm_size    = 0
      services_limit   = -1
      oom_score_adjust = -500
      pull_policy = "sometimes"          # ERROR: "docker.pull_policy" must be one of "always", "if-not-present" and "never"; got "sometimes".
      allowed_pull_policies = [
        "always",
        "allways",                       # ERROR: "docker.allowed_pull_policies[1]" must be one of "always", "if-not-present" and "never"; got "allways" (did you mean "always"?).
      ]
      extra_hosts = [
        "gitlab.example.com:192.0.2.3",
        5,                               # ERROR: "docker.extra_hosts[1]" must be a string; got the number 5. Write "5" instead
      ]
      sysctls = {
        "net.ipv4.ip_forward" = 1        # ERROR: "docker.sysctls.net.ipv4.ip_forward" must be a string; got the number 1. Write "net.ipv4.ip_forward" = "1".
        "net.core.somaxconn"  = "1024"
      }
      ulimit   = ["nofile=1024"]         # ERROR: "docker.ulimit" must be a table; got a list
      services_devices = { "*" = "/dev/fuse" } # ERROR: must be a list; got the string "/dev/fuse". Write "*" = ["/dev/fuse"].
      wait_for_services_timeout = "1m"   # ERROR: "docker.wait_for_services_timeout" must be a whole number of seconds; got the string "1m". Write wait_for_services_timeout = 60
      services = [
        { name = "docker:dind", environment = ["DOCKER_TLS_CERTDIR="] },
        {
          name        = "redis:7"
          environment = ["PLAIN"]        # ERROR: "docker.services[1].environment[0]" must be NAME=value; got "PLAIN".
          aliases     = ["r"]            # WARNING: "docker.services[1].aliases" is not a setting of GitLab Runner 19.4; did you mean "docker.services[1].alias"?
        },
        "redis",                         # ERROR: "docker.services[2]" must be a table; got the string "redis". Write { … } instead
      ]
    }
    cache = {
      Type = "S3"                        # ERROR: "cache.Type" must be one of "s3", "gcs", "azure", "s3v2" and "gcsv2"; got "S3" (did you mean "s3"?).
      s3   = { SecretKey = file("/run/secrets/s3"), Insecure = file("/run/secrets/s3") } # ERROR: "cache.s3.Insecure" must be true or false; got a secret, which is a string.
    }
    monitoring = { job_queuing_durations = { periods = ["* * * * *"] } } # ERROR: "monitoring.job_queuing_durations" must be a list of tables; got a table. Write job_queuing_durations = [{ … }].
    autoscaler = {
      instance_life_duration_buckets = [1, 2.5, "5"] # ERROR: "autoscaler.instance_life_duration_buckets[2]" must be a number; got the string "5". Write 5 instead
      scale_throttle   = { limit = 2, burst = "10" } # ERROR: "autoscaler.scale_throttle.burst" must be a whole number; got the string "10". Write burst = 10
      connector_config = {
        username = "gitlab"              # ERROR: "autoscaler.connector_config.username" is "gitlab", but a worker's key is made for the image's user "ci". Omit it, or write user = "gitlab" in the image block.
        protocol = "winrm"               # ERROR: but workers are reached over SSH
        os       = "windows"             # ERROR: but workers run Linux
        password = "hunter2"             # ERROR: "autoscaler.connector_config.password" is a secret && WARNING: "autoscaler.connector_config.password" is used with use_static_credentials = true only
      }
    }
  }
}

runner "places" {
  pool  = pool.b
  url   = "https://gitlab.example.com"
  token = env("TOKEN")
  settings = {
    id                 = 0               # ERROR: "id" must be at least 1; got 0.
    Cache              = {}              # ERROR: GitLab Runner spells "Cache" as cache. Write cache.
    "runners.cache.s3" = { BucketName = "x" } # ERROR: A key names one setting, not a path. Write cache = { s3 = { … } } for "runners.cache.s3".
    "cache.Shared"     = true            # ERROR: Write cache = { Shared = … } for "cache.Shared".
    "session_server.listen_address" = ":8093" # ERROR: is global in config.toml. Write gitlab_runner { session_server = { listen_address = … } } in the host block.
    "a.b"              = 1               # ERROR: A key names one setting, and "a.b" has a dot. Write nested tables
    runners            = {}              # ERROR: settings is the [[runners]] section itself
    listen_address     = ":9252"         # ERROR: It is global in config.toml. Write gitlab_runner { listen_address = … } in the host block.
    session_timeout    = 1800            # ERROR: Write gitlab_runner { session_server = { session_timeout = … } } in the host block.
    privileged         = true            # ERROR: "privileged" is not a setting of a [[runners]] section. Write docker = { privileged = … }.
    max_instances      = 4               # ERROR: settings may not have "max_instances": write max_instances = … in the pool block.
    BucketName         = "x"             # ERROR: Write cache = { gcs = { BucketName = … } } or cache = { s3 = { BucketName = … } }.
    tags               = ["a"]           # ERROR: settings may not have "tags": it is set in GitLab, where the runner was created.
    kubernetes         = { bearer_token = "x" } # ERROR: settings may not have "kubernetes": it belongs to the kubernetes executor && ERROR: "kubernetes.bearer_token" is a secret
    pre_build_scripts  = "x"             # WARNING: "pre_build_scripts" is not a setting of GitLab Runner 19.4; did you mean "pre_build_script"? GitLab Runner ignores unknown settings.
    runtime_environment_ttl = "1h"       # WARNING: "runtime_environment_ttl" is not a setting of GitLab Runner 19.4. GitLab Runner ignores unknown settings.
    cache = {
      clone_url = "https://x"            # ERROR: "cache.clone_url" is not a setting of "cache". Write clone_url outside of it, directly in settings.
      s3        = { secret_key = "k" }   # ERROR: GitLab Runner spells "cache.s3.secret_key" as SecretKey. Write SecretKey. && ERROR: is a secret
      "s3.BucketName" = "x"              # ERROR: Write cache = { s3 = { BucketName = … } } for "s3.BucketName".
    }
    environment = { B = "c", A = "$${x}" } # ERROR: "environment" must be a list; got a table. Write environment = ["A=$${x}", "B=c"]
    instance   = { allowed_images = [] }
    autoscaler = {
      Max_Instances = 4                  # ERROR: settings may not have "autoscaler.Max_Instances": write max_instances = … in the pool block
      timeout       = "1m"               # ERROR: Write autoscaler = { connector_config = { timeout = … } }.
      connector_config = {
        username               = "gitlab"
        use_static_credentials = true
        key_path               = "/etc/fleetingd/key"
      }
    }
  }
}
