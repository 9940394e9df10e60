#!/usr/bin/env bash
# Make one virtual environment for each group of attack tools that can live together.
#
#     benchmarks/survival/environments.sh FOLDER [quant gptq merge llama]
#
# llama compiles llama.cpp (about 10 minutes on two cores); its converter is taken from the same sources.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift
here=$(cd "$(dirname "$0")" && pwd)
constraints=$here/../../constraints.txt

packages() {
    case $1 in
        quant) echo "torch transformers==5.23.* accelerate bitsandbytes==0.50.* torchao==0.18.* optimum-quanto==0.2.7" ;;
        gptq) echo "torch llmcompressor==0.14.*" ;;
        merge) echo "torch mergekit==0.1.5" ;;
        llama) echo "torch transformers==5.23.* gguf==0.19.* sentencepiece protobuf llama-cpp-python[server]==0.3.36" ;;
        *) echo "error: no environment named $1" >&2 && exit 2 ;;
    esac
}

for name in "${@:-quant gptq merge llama}"; do
    for one in $name; do
        # Word splitting is wanted: a list of packages.
        # shellcheck disable=SC2046
        python3 -m venv "$folder/$one" && "$folder/$one/bin/pip" install --quiet -c "$constraints" $(packages "$one")
        echo "$one: ready" >&2
        if [ "$one" = llama ] && [ ! -d "$folder/llama.cpp" ]; then
            "$folder/$one/bin/pip" download --quiet --no-deps --no-binary :all: -d "$folder" llama-cpp-python==0.3.36
            mkdir "$folder/sources"
            tar xzf "$folder"/llama_cpp_python-0.3.36.tar.gz -C "$folder/sources" --strip-components=1
            mv "$folder/sources/vendor/llama.cpp" "$folder/llama.cpp"
        fi
    done
done
