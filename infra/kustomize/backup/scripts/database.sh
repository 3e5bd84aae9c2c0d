#!/bin/sh
# Dump or restore the database of the service file that `backup.py connection` wrote (PGSERVICEFILE).
#   database.sh dump BACKUPS            write BACKUPS/next/database.dump
#   database.sh restore BACKUPS NAME    replace the database's content by that of a backup, all of it or nothing
set -eu
export PGSERVICE=univigu PGCONNECT_TIMEOUT=30

case $1 in
dump)
    rm -rf "$2/next"
    mkdir -p "$2/next"
    pg_dump --format=custom --file="$2/next/database.dump"
    ;;
restore)
    # Everything is read from the dump first: a pipe that breaks would look like its end.
    script=$(mktemp)
    trap 'rm -f "$script"' EXIT
    echo 'DROP SCHEMA public CASCADE; CREATE SCHEMA public AUTHORIZATION pg_database_owner;' >"$script"
    pg_restore --no-owner --no-privileges --file=- "$2/$3/database.dump" >>"$script"
    psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 --single-transaction --output=/dev/null --file="$script"
    ;;
*)
    echo "database.sh: '$1' is neither dump nor restore" >&2
    exit 2
    ;;
esac
