host "metal-01" {
  egress_interface = "eno1"
}

image "ubuntu" {
  ubuntu {
    release = "noble"
  }
}

pool "small" {
  image         = image.ubuntu
  cpus          = 1
  memory        = "1GiB"
  disk          = "5GiB"
  max_instances = 4
}

variable "token" {
  sensitive = true
  default   = "glrt-by-default"
}

locals {
  secret = var.token
  plain  = "glrt-local"
}

runner "a" {
  pool                  = pool.smal # ERROR: There is no pool "smal". Did you mean pool.small?
  url                   = "gitlab.example.com" # ERROR: it must start with https:// or http://
  token                 = "glrt-literal" # ERROR: Everyone who can read the spec, its repository or its plan could read a secret that is written in it
  executor              = "docker" # ERROR: executor must be "instance" or "docker-autoscaler"; got "docker" (did you mean "docker-autoscaler"?)
  capacity_per_instance = 0 # ERROR: capacity_per_instance must be between 1 and 1024; got 0.
  max_use_count         = -1 # ERROR: max_use_count must be between 0 and
  policy {
    periods    = ["* * *", "60 * * * *", "* * * * fry", "* 18-8 * * *", "@daily", "* */0 * * *"] # ERROR: this has 3 && ERROR: the minute "60" must be a number from 0 to 59 && ERROR: (did you mean "fri"?) && ERROR: runs backwards: write "18-23,0-8" && ERROR: not an @word && ERROR: the step "0" of the hour
    timezone   = "europe/berlin" # ERROR: Did you mean "Europe/Berlin"
    idle_count = -1 # ERROR: idle_count must be between 0 and 1048576; got -1.
    idle_time  = "-5m" # ERROR: a duration cannot be negative
    scale_factor = -0.5 # ERROR: scale_factor must be between 0 (off) and 1000; got -0.5.
    idle = 3 # ERROR: An argument named "idle" is not expected here
  }
}

runner "b" {
  pool  = pool.small
  url   = "https://gitlab.example.com"
  token = file("secrets/token") # ERROR: its path must be absolute: write file("/run/secrets/token")
  settings = {
    executor  = "shell" # ERROR: settings may not have "executor": write executor = … in the runner block
    tokn      = "x" # WARNING: "tokn" is not a setting of GitLab Runner 19.4; did you mean "token"?
    docker    = { image = "alpine" } # WARNING: "docker" is for executor = "docker-autoscaler", but this runner has "instance", so GitLab Runner ignores it
    autoscaler = { max_instances = 3 } # ERROR: write max_instances = … in the pool block
  }
  policy {
    idle_count = 5 # WARNING: idle_count is 5, but pool "small" has room for 4 jobs.
    timezone   = "CEST" # ERROR: "CEST" is not a time zone
    periods    = [] # ERROR: An empty list matches no time
    idle_time  = 300 # ERROR: "300": the unit is missing: write "300s" or "300m"
  }
}

runner "c" {
  pool  = pool.small # ERROR: Pool "small" is already used by the runner
  url   = var.token # ERROR: The value comes from a secret
  token = var.token # ERROR: The variable "token" is not set, and everyone who can read the spec can read its default
  settings = { environment = ["X=${local.secret}"] } # ERROR: The variable "token" is not set, and everyone who can read the spec can read its default
}

runner "d" { # ERROR: runner "d" needs token && ERROR: needs url
  pool = "small" # ERROR: Write the name of a pool block: pool = pool.small
}

runner "e" {
  pool  = pool.small # ERROR: Pool "small" is already used by the runner
  url   = "https://gitlab.example.com"
  token = local.plain # ERROR: A secret is only referred to
  settings = ["x"] # ERROR: settings must be a map; got a list
}

runner "f" {
  pool  = pool.small # ERROR: Pool "small" is already used by the runner
  url   = upper(parseint(var.token, 10)) # ERROR: so parseint cannot work on it
  token = "glrt-${var.token}" # ERROR: The variable "token" is not set, and everyone who can read the spec can read its default
  settings = { list = [null] } # ERROR: A list in it has a null
}

runner "g" {
  pool  = pool.small # ERROR: Pool "small" is already used by the runner
  url   = "https://gitlab.example.com"
  token = env("TOKEN")
  settings = {
    docker             = "alpine" # ERROR: "docker" must be a table; got the string "alpine". Write docker = { … }. && WARNING: "docker" is for executor = "docker-autoscaler"
    unhealthy_interval = "soon" # ERROR: "unhealthy_interval" must be a duration with a unit; got the string "soon". Write unhealthy_interval = "30s", for example.
    autoscaler = {
      state_storage   = true # ERROR: "autoscaler.state_storage" must be a table; got the boolean true
      update_interval = 5 # ERROR: got 5, which GitLab Runner reads as nanoseconds. Write update_interval = "5s"
      connector_config = {
        timeout   = 0.5 # ERROR: "autoscaler.connector_config.timeout" must be a duration with a unit; got 0.5, which GitLab Runner reads as nanoseconds. Write timeout = "0.5s"
        keepalive = "30s"
      }
    }
  }
}

runner "h" {
  pool  = pool.small # ERROR: Pool "small" is already used by the runner
  url   = "https://gitlab.example.com"
  token = env("TOKEN")
  settings = { autoscaler = 5 } # ERROR: "autoscaler" must be a table; got the number 5
}

# What the runner's unit does not see.
host "home" {
  egress_interface = "eno1"
  state_dir        = "/home/ci/fleetingd" # ERROR: The runner cannot see /home/ci/fleetingd: its unit hides home folders (ProtectHome=)
}

host "tmp" {
  egress_interface = "eno1"
  state_dir        = "/var/tmp/fleetingd" # WARNING: The runner cannot see /var/tmp/fleetingd: its unit has its own /tmp (PrivateTmp=), and the system cleans that folder up
}

runner "i" {
  pool  = pool.small # ERROR: Pool "small" is already used by the runner
  url   = "https://gitlab.example.com:70000" # ERROR: port numbers go from 1 to 65535
  token = fil("/run/secrets/gitlab-token") # ERROR: There is no function named "fil"
}
