host "metal-01" {
  egress_interface = "eno1"
  gitlab_runner {
    concurrent         = 0                # ERROR: "concurrent" must be at least 1; got 0.
    check_interval     = "3s"             # ERROR: "check_interval" must be a whole number of seconds; got the string "3s". Write check_interval = 3
    shutdown_timeout   = "3600"           # ERROR: Write shutdown_timeout = 3600
    connection_max_age = 900              # ERROR: got 900, which GitLab Runner reads as nanoseconds. Write connection_max_age = "900s"
    listen_address     = 9252             # ERROR: "listen_address" must be a string; got the number 9252. Write listen_address = ":9252"
    log_format         = "jsno"           # ERROR: "log_format" must be one of "runner", "text" and "json"; got "jsno" (did you mean "json"?).
    log_level          = "warn"
    sentry_dsn         = "https://x@sentry.example.com/1"
    session_server     = {
      listen_address    = "[::]"          # ERROR: "session_server.listen_address" must be an address with a port; got "[::]".
      advertise_address = "ci.example.com:8093"
      session_timeout   = "30m"           # ERROR: Write session_timeout = 1800
    }
    Concurrent         = 3                # ERROR: GitLab Runner spells "Concurrent" as concurrent.
    runners            = []               # ERROR: gitlab_runner may not have "runners": write runner blocks.
    limit              = 5                # ERROR: "limit" is not a setting of gitlab_runner. It belongs to each runner. Write settings = { limit = … } in the runner block.
    volumes            = []               # ERROR: Write settings = { docker = { volumes = … } } in the runner block.
    token              = "glrt-x"         # ERROR: gitlab_runner may not have "token": write token = … in the runner block.
    listen_addr        = ":9252"          # WARNING: "listen_addr" is not a setting of GitLab Runner 19.4; did you mean "listen_address"?
    labels             = ["a"]            # ERROR: "labels" must be a table; got a list
  }
}

host "b" {
  egress_interface = "eno1"
  gitlab_runner {
    session_server { # ERROR: Settings of gitlab_runner are written with an equals sign. Write session_server = { … }.
      listen_address = ":8093"
    }
  }
  gitlab_runner {} # ERROR: has a gitlab_runner block at
}

image "ubuntu" {
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
