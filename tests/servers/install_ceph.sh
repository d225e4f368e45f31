#!/bin/sh
# Makes .ceph in the repository's root: Ceph's monitor, disk and S3 gateway, unpacked from Debian's packages (60 MB to fetch).
# Nothing is installed into the system and no rights are needed. Ends with 3 where there is no Debian to fetch them from.
# Safe to run again, and by two processes at once: the folder is made aside and moved into place when it is whole.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
target="$root/.ceph"
[ -f "$target/installed" ] && exit 0
command -v apt-get > /dev/null && command -v dpkg > /dev/null || exit 3
exec 9> "$target.lock"
flock 9
[ -f "$target/installed" ] && exit 0
needed=$(apt-get -s install --no-install-recommends ceph-mon ceph-osd radosgw ceph-common python3-rados python3-prettytable \
  | awk '$1 == "Inst" { print $2 }' \
  | grep -Ev '^(sudo|lvm2|dmeventd|liblvm2cmd|libdevmapper-event|cryptsetup-bin|gdisk|hdparm|nvme-cli|libnvme|dmidecode|parted|libparted2|smartmontools|xfsprogs|libinih1|uuid-runtime|logrotate)') || exit 3
rm -rf "$target.new"
mkdir -p "$target.new/packages"
# shellcheck disable=SC2086
(cd "$target.new/packages" && apt-get download -qq $needed) || exit 3
for package in "$target.new/packages"/*.deb; do dpkg -x "$package" "$target.new"; done
rm -rf "$target.new/packages" "$target"
touch "$target.new/installed"
mv "$target.new" "$target"
