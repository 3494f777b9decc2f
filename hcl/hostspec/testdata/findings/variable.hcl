variable "unset" { # ERROR: The variable "unset" has no default and was not set. Set it with --var unset=VALUE
}
variable "unset" { # ERROR: The variable "unset" is already declared at testdata/findings/variable.hcl:1,1-17
}
variable "kind" {
  type    = strin # ERROR: Invalid type specification
  default = 1
}
variable "number" {
  type    = number
  default = "many" # ERROR: declared as number, and the value from its default does not fit: a number is required
}
variable "refers" {
  default = var.number # ERROR: Variables not allowed
}
variable "not an identifier" { # ERROR: cannot be written as var.NAME
}
variable "attrs" {
  default   = 1
  sensitive = "maybe" # ERROR: "sensitive" must be a literal bool
  validate  = true # ERROR: An argument named "validate" is not expected here
}

locals {
  a      = local.b # ERROR: local.a → local.b → local.c → local.a
  b      = local.c
  c      = local.a
  self   = local.self # ERROR: local.self → local.self
  domain = "ci.example.com"
  nope   = var.domian # ERROR: There is no variable "domian"
  nope2  = local.domian # ERROR: There is no local.domian (did you mean "domain"?)
  all    = local # ERROR: Write local.NAME
  func   = filee("x") # ERROR: Did you mean "file"?
  root   = vra.x # ERROR: did you mean "var"?
  env    = env("FLEETINGD_TEST_NOT_SET") # where it is a secret, it is read later
}

locals {
  domain = "twice" # ERROR: local.domain is already defined at testdata/findings/variable.hcl:29,3-9
}

host "metal-01" {
  egress_interface = var.unset
  state_dir        = local.a
}

image "ubuntu" {
  ubuntu {
    release = "${local.domain}" # ERROR: "ci.example.com" is not a code name
  }
}

pool "small" {
  image         = image.ubuntu
  cpus          = var.kind
  memory        = "1GiB"
  disk          = "5GiB"
  max_instances = var.number
}

imag "x" { # ERROR: Did you mean "image"?
}

runner { # ERROR: Missing name for runner
}

provider "x" "y" { # ERROR: Blocks of type "provider" are not expected here
}
