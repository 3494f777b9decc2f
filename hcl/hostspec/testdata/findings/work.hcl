locals {
  fmt    = format("%1000000000d", 1) # ERROR: a width of 1000000000 is too large; the most is 128
  prec   = format("%.1000000000f", 1) # ERROR: a width of 1000000000 is too large
  indent = indent(1000000000, "a\nb") # ERROR: between 0 and 128 spaces
  range  = range(1000000000) # ERROR: more than 1024 values
  prod   = setproduct(range(1000), range(1000), range(1000)) # ERROR: Evaluating this could touch more than
  loops  = [for a in range(1000) : [for b in range(1000) : [for c in range(1000) : a]]] # ERROR: Evaluating this could touch
  join   = join("", [for a in range(1000) : replace(join("", range(1000)), "1", join("", range(1000)))]) # ERROR: Evaluating this could touch
  pow    = pow(10, 1000000)
  a      = join("", [for i in range(1000) : "0123456789"])
  b      = "${local.a}${local.a}${local.a}${local.a}${local.a}${local.a}${local.a}${local.a}${local.a}${local.a}"
  c      = "${local.b}${local.b}${local.b}${local.b}${local.b}${local.b}${local.b}${local.b}${local.b}${local.b}" # ERROR: The value of local.c has a size of
  d      = "${local.c}${local.c}"
  num1   = "${tonumber("1e9${"9"}9999999")}" # ERROR: the exponent of a number may be at most 300
  num2   = "${"1e999999999" + 1}" # ERROR: Evaluating this could touch more than
  num3   = jsondecode("[1e9${"9"}9999999]") # ERROR: the exponent of a number may be at most 300
  num4   = log(-1, 0) # ERROR: log cannot use these arguments
  host   = cidrhost("10.0.0.0/24", 256) # ERROR: a /24 has 256 addresses
  net    = cidrsubnet("10.0.0.0/24", 9, 0) # ERROR: can be made between 0 and 8 bits longer
}

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
  max_instances = 1
}
