#compdef safegrad
# completion.zsh: the completion of bash, in zsh. Installed as share/zsh/site-functions/_safegrad, beside bash's.

local script=${${(%):-%x}:A:h}/../../bash-completion/completions/safegrad word
local -a asked found folders keys rest
# As bash would take the words apart.
for word in "${(@)words[1,CURRENT-1]}" "$PREFIX"; do
  [[ $word == *=* ]] && asked+=("${word%%=*}" = "${word#*=}") || asked+=("$word")
done
compset -P '*='
found=("${(@f)$(bash -c '
  source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _safegrad; printf "%s\n" "${COMPREPLY[@]}"
  ' "$script" "${(@)asked}")}")
for word in "${(@)found}"; do
  if [[ $word == *= ]]; then keys+=("$word")
  elif [[ -d $word ]]; then folders+=("$word/")
  elif [[ -n $word ]]; then rest+=("$word")
  fi
done
compadd -S '' -- "${(@)keys}" "${(@)folders}"
compadd -- "${(@)rest}"
