#!/bin/sh
# A job whose checkpoint no late attempt can overwrite: it counts to STEPS, and publishes after each step.
#
#   ares submit --retries 3 -- sh examples/checkpoint/train.sh /shared/run1/model
#
# /shared must be seen by every machine that may run the job. ARES_FENCING_TOKEN is set by the agent.
set -eu
model=${1:?usage: train.sh CHECKPOINT}
ares=${ARES:-ares}
step=0
if [ -e "$model/step" ]; then
    step=$(cat "$model/step")
    echo "attempt ${ARES_ATTEMPT:-1} goes on at step $step"
fi
while [ "$step" -lt "${STEPS:-5}" ]; do
    step=$((step + 1))
    sleep "${STEP_SECONDS:-1}"
    # The command makes the new checkpoint beside the old one; it takes its place whole, or not at all.
    # Exit code 5: a later attempt has the checkpoint, and this one ends here.
    "$ares" fence publish "$model" -- sh -c 'mkdir "$ARES_PUBLISH_PATH" && echo "$1" > "$ARES_PUBLISH_PATH/step"' sh "$step"
    echo "step $step is safe"
done
# A step of the script that must not overlap with an older attempt's.
"$ares" fence run "$model" -- sh -c 'echo "attempt ${ARES_ATTEMPT:-1} is done" >> "$1.done"' sh "$model"
