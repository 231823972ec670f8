#!/bin/bash
# Inside the machine: does what comes over the second serial line, one command a line in base64, and answers each with its exit code and what it said.
stty -F /dev/ttyS1 raw -echo
exec 3<>/dev/ttyS1
echo up >&3
while IFS= read -r line <&3; do
    base64 -d <<<"$line" >/run/keepd-test-command
    bash /run/keepd-test-command >/run/keepd-test-answer 2>&1 </dev/null 3>&-
    echo "$? $(tail -c 300000 /run/keepd-test-answer | base64 -w0)" >&3
done
