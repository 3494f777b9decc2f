#!/bin/sh
# By fleetingd, when it sealed this image: cloud-init is disabled in it, and its workers are ready before a job starts. This is what
# cloud-init itself says then, without the seconds that it takes. All else is left to cloud-init.
if [ -e /etc/cloud/cloud-init.disabled ]; then
  case $* in
  "status") echo "status: disabled"; exit 0 ;;
  "status --wait" | "status -w") printf '\nstatus: disabled\n'; exit 0 ;;
  esac
fi
exec /usr/bin/cloud-init "$@"
