# fish completion for rrun. The commands are taken from the output of `rrun --help`.

function __rrun_commands
    rrun --help 2>/dev/null | string replace -rf '^   ([a-z]+) +(.*)$' '$1\t$2' | string match -rv '^-'
end

complete -c rrun -f -n __fish_use_subcommand -a '(__rrun_commands)'
complete -c rrun -n 'not __fish_use_subcommand' -a '(rrun list --quiet 2>/dev/null)'
complete -c rrun -n '__fish_seen_subcommand_from kill; and test (count (commandline -opc)) -ge 3' -a 'TERM KILL INT HUP QUIT ABRT USR1 USR2 STOP CONT TSTP WINCH ALRM PIPE'
complete -c rrun -l root -r -d 'directory for the state of containers'
complete -c rrun -l log -r -d 'file to which the log is appended'
complete -c rrun -l debug -d 'write more log messages'
complete -c rrun -l rootless -x -a 'true false auto' -d 'accepted for compatibility with runc; has no effect'
complete -c rrun -l systemd-cgroup -d 'let systemd create the cgroup of a new container'
complete -c rrun -l log-format -x -a 'text json' -d 'format of the log'
