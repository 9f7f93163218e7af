# CANN's variables, read by every bash of the NPU image (BASH_ENV); what is not there is passed over.
for script in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/cann/set_env.sh /usr/local/Ascend/nnal/atb/set_env.sh; do
  # shellcheck disable=SC1090
  if [ -f "$script" ]; then . "$script"; fi
done
