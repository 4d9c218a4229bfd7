# shellcheck shell=bash
# What your site needs. Such scripts read variables that are not set.
set +u
@LINES@
set -u
