#!/usr/bin/env bash
# What every image needs (Dockerfile), done once, as root: ssh for jobs on several hosts, a user who is not root, directories.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

if ! command -v ssh >/dev/null || [ ! -x /usr/sbin/sshd ]; then
  apt-get update
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends openssh-client openssh-server
  rm -rf /var/lib/apt/lists/*
fi
# Installing made keys, the same for all containers of this image. What a worker shows is the job's own (sshd_config).
rm -f /etc/ssh/ssh_host_*

mkdir -p /etc/hvd-vgg/ssh /run/sshd
install -m 644 "$here/sshd_config" /etc/hvd-vgg/sshd_config
install -m 755 "$here/hvd-vgg-ssh" /usr/local/bin/hvd-vgg-ssh

if ! getent passwd 1000 >/dev/null; then
  useradd --uid 1000 --user-group --create-home --shell /bin/bash hvd
fi
install -d -o 1000 -g 1000 /data /runs
