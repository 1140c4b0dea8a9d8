# shellcheck shell=bash
# This file is sourced, not run. The functions in this file run shell commands as checks. They print
# the results in the same format as `cargo test`. A check that fails is repeated once, immediately.
# If the check then passes, the line `flaky: NAME` reports it.
#
#   attempt NAME CMD…     runs the check. Status 77 means that the check is skipped. The last line of
#                         the output is then the reason.
#   count_results FILE    prints the number of tests that passed, failed and were ignored. FILE
#                         contains the result lines of the tests.
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
