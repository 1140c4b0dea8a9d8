# shellcheck shell=bash
# Sourced, not run. Runs checks that are shell commands, and reports them as cargo reports tests. A
# check that fails is repeated once, immediately. If it then passes, the line `flaky: NAME` reports
# it.
#
#   attempt NAME CMD…     runs the check; status 77 means skipped, and the last line of the output is
#                         the reason
#   count_results FILE    prints how many tests passed, failed and were ignored, by the result lines in
#                         a file
#   attempts_result       prints the result line, and fails if a check failed

passed=0 failed=0 ignored=0

attempt() {
    local name=$1 output first status=0
    shift
    output=$("$@" 2>&1) || status=$?
    if [[ $status -ne 0 && $status -ne 77 ]]; then
        first=$output
        status=0
        output=$("$@" 2>&1) || status=$?
        [[ $status -ne 0 ]] || printf 'flaky: %s\n%s\n' "$name" "$(sed 's/^/    /' <<<"$first")"
    fi
    case $status in
        0) passed=$((passed + 1)); echo "test $name ... ok" ;;
        77) ignored=$((ignored + 1)); echo "test $name ... ignored, $(tail -n 1 <<<"$output")" ;;
        *)
            failed=$((failed + 1))
            printf -- '---- %s ----\n%s\n\n' "$name" "$output"
            echo "test $name ... FAILED"
            ;;
    esac
}

attempts_result() {
    local result=ok
    [[ $failed -eq 0 ]] || result=FAILED
    printf '\ntest result: %s. %d passed; %d failed; %d ignored\n' "$result" "$passed" "$failed" "$ignored"
    [[ $failed -eq 0 ]]
}

count_results() {
    awk '/^test result: / {
        for (i = 2; i <= NF; i++) {
            if ($i == "passed;") passed += $(i - 1)
            if ($i == "failed;") failed += $(i - 1)
            if ($i ~ /^ignored;?$/) ignored += $(i - 1)
        }
    }
    END { print passed + 0, failed + 0, ignored + 0 }' "$1"
}
