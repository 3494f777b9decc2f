host "metal-01" {
  egress_interface = "eno1"
}

image "none" { # ERROR: The image "none" has no source
}

image "two" { # ERROR: has the sources "ubuntu" and "debian". Keep one
  ubuntu {
    release = "24.04" # ERROR: Write the code name of "24.04": release = "noble"
  }
  debian {
    suite    = "Debian 13" # ERROR: Write one in lower case, such as "trixie"
    packages = ["git curl", "-o=x"] # ERROR: "git curl" is not the name of a Debian package. Write "git", "curl". && ERROR: "-o=x" is not the name
    mirror   = "ftp://mirror" # ERROR: it must start with https:// or http://
    security_mirror = "no" # ERROR: it must start with https:// or http://
    arch     = "x86_64" # ERROR: arch must be one of "amd64", "arm64" and "riscv64"; got "x86_64".
  }
}

image "url" {
  url { # ERROR: url needs kernel. Write, for example: kernel =
    disk   = "https://user:hunter2@images.example.com/x.qcow2" # ERROR: holds a user or password
    sha256 = "9F86D081884C7D659A2FEAA0C55AD015A3BF4F1B2B0B822CD15D6C15B0F00A08" # ERROR: Write it in lower case
  }
}

image "http" {
  url {
    disk   = "http://images.example.com/x.qcow2" # WARNING: SHA256SUMS comes from images.example.com over http, so anyone who can change the image on its way can change the checksums too
    kernel = "https://" # ERROR: it names no host
    initrd = "images/initrd" # ERROR: it must start with
  }
}

image "file" {
  file {
    disk    = "golden.qcow2" # ERROR: is not the absolute path of a file. Write, for example, "/srv/images/golden.qcow2"
    kernel  = "/srv/vmlinuz"
    cmdline = "a\nb" # ERROR: one line of at most
  }
  user = "root" # ERROR: cloud-init does not allow logins as root
}

image "prebuild" {
  user = "Build User" # ERROR: "Build User" is not a valid account name: use at most 32 lower-case letters, digits, - and _, beginning with a letter
  debian {
    suite = "trixie"
    packages = ["git", "git"] # WARNING: The package git is in the list twice
  }
  prebuild {
    packages = [["git"]] # ERROR: Element 0 of the list is tuple
    run      = ["true", " "] # ERROR: Command 1 is empty
    timeout  = "0s" # ERROR: A prebuild's timeout must be between 1s and 24h; got 0s
    script   = "x" # ERROR: An argument named "script" is not expected here
    file "etc/motd" { # ERROR: is not the clean, absolute path of a file in the guest
      content = "x"
    }
    file "/etc/motd" {
      content = file("missing.txt") # ERROR: no such file or directory
      mode    = "rw-r--r--" # ERROR: a mode is octal digits
    }
    file "/etc/motd" { # ERROR: /etc/motd is already written at testdata/findings/image.hcl:59,10-21 && ERROR: needs content
      mode = 755 # ERROR: mode must be octal digits in quotes; got a number
    }
    file "/etc/zero" {
      content = file("/dev/zero") # a place on the host, read when the file is written
    }
    file "/etc/dir" {
      content = file(".") # ERROR: it is a directory, not a regular file
    }
  }
}

image "Bad_Name" { # ERROR: cannot be an image's name: use lower-case letters, digits and -, beginning with a letter (such as "bad-name")
  ubuntu {
    release = "noble"
    relase  = "noble" # ERROR: is not expected here
    mirorr  = "x"     # ERROR: Did you mean "mirror"?
  }
}

image "a-name-that-is-longer-than-it-may-be" { # ERROR: The name "a-name-that-is-longer-than-it-may-be" has 36 characters; an image's name may have 32, because it becomes part of paths and host names
  ubuntu { # ERROR: ubuntu needs release
  }
  ubuntu { # ERROR: image "a-name-that-is-longer-than-it-may-be" already has a ubuntu block at testdata/findings/image.hcl:84,3-9; only one is allowed
  }
}

pool "p" {
  image         = image.url
  cpus          = 1
  memory        = "1GiB"
  disk          = "5GiB"
  max_instances = 1
}

image "shell" {
  debian {
    suite = "trixie"
  }
  prebuild {
    run = [
      "echo $HOME $${HOME} %%{http_code}",
      "echo ${HOME}", # ERROR: There is no "HOME". An expression can refer to var.NAME and local.NAME. If it is meant for a shell, write $${HOME} instead of ${HOME}
      "echo ${host.name}", # ERROR: There is no "host". An expression can refer to
      join(" ", [for k, v in { a = "b" } : "${k}=${v}"]),
    ]
  }
}

image "scripts" {
  debian {
    suite = "trixie"
  }
  prebuild {
    run = [
      "#!/usr/bin/env python3\nprint(1)",
      "#! /bin/sh",
      "#!bash\ntrue", # ERROR: Command 2 starts with "#!bash", which must name an interpreter by its absolute path.
    ]
  }
}
