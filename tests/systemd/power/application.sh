#!/bin/bash
# Inside the machine, as the shop's user: an application that writes into a SQLite database in WAL mode, a few times a second.
# Each transaction inserts two rows with the next number and removes the oldest: an odd count or a gap is no moment of history.
while :; do
    echo "begin immediate;
        insert into pairs select m, half, randomblob(300) from (select coalesce(max(n), 0) + 1 as m from pairs), (select 'a' as half union select 'b');
        delete from pairs where n <= (select max(n) from pairs) - 300;
        commit;"
    read -rt 0.2 <&9
done 9<> <(:) | sqlite3 -cmd ".timeout 20000" "$1"
