# SPDX-License-Identifier: Apache-2.0
# Installs the build of `BUILT` below `FOLDER`, builds the project in `SOURCE` against it and runs its program.
function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    list(JOIN ARGV " " command)
    message(FATAL_ERROR "'${command}' ended with ${result}")
  endif()
endfunction()

file(REMOVE_RECURSE "${FOLDER}")
run("${CMAKE_COMMAND}" --install "${BUILT}" --prefix "${FOLDER}/prefix" --config "${CONFIG}")
run("${CMAKE_COMMAND}" -S "${SOURCE}" -B "${FOLDER}/build" -G "${GENERATOR}" "-DCMAKE_CXX_COMPILER=${CXX}"
    "-DCMAKE_PREFIX_PATH=${FOLDER}/prefix" "-DCMAKE_BUILD_TYPE=${CONFIG}")
run("${CMAKE_COMMAND}" --build "${FOLDER}/build" --config "${CONFIG}")
find_program(program NAMES program PATHS "${FOLDER}/build" "${FOLDER}/build/${CONFIG}" NO_DEFAULT_PATH REQUIRED)
run("${program}")
