egress_interface = "eno1" # ERROR: A spec may have: variable "gitlab_url" { }, locals { }, host "metal-01" { }
network { # ERROR: Blocks of type "network" are not expected here. A spec may have: variable
}
host { # ERROR: Write, for example: host "metal-01" {
  egress_interface = "eno1"
}
locals "x" { # ERROR: No labels are expected for locals blocks. Write, for example: locals {
}
variable "v" {
  default = 1
  validation { # ERROR: variable "v" may have: type, default, sensitive, description
  }
}

host "metal-01" {
  egress_interface = "eno1"
  network {
    egress { # ERROR: Write, for example: egress "artifact-store" {
      action = "allow"
    }
    egress "a" "b" { # ERROR: Only 1 labels (name) are expected for egress blocks. Write, for example: egress "artifact-store" {
      action = "allow"
    }
    egress "ping" {
      action = "allow"
      ports  = ["icmp/8"] # ERROR: write "tcp/8", or omit ports for every protocol
    }
  }
}

image "debian" {
  debian {
    suite = "trixie"
  }
}

pool "small" {
  image         = "debian" # ERROR: Write the name of an image block: image = image.debian
  cpus          = 1
  memory        = "1GiB"
  disk          = "5GiB"
  max_instances = 1
}

runner "small" {
  pool  = "small" # ERROR: Write the name of a pool block: pool = pool.small
  url   = "https://gitlab.example.com"
  token = env("TOKEN")
}

runner "other" {
  pool  = "a b" # ERROR: Write the name of a pool block: pool = pool.small
  url   = "https://gitlab.example.com"
  token = env("TOKEN")
}
