# SPDX-License-Identifier: Apache-2.0
# Passes if one of eight seeds makes `EXECUTABLE CASE` fail with PATTERN in its output. A plain crash is no catch.
foreach(seed RANGE 7)
  execute_process(COMMAND ${CMAKE_COMMAND} -E env GFL_HOST_SEED=${seed} GFL_HOST_TIMEOUT=2 ${EXECUTABLE} ${CASE}
                  RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT status EQUAL 0)
    if(NOT output MATCHES "${PATTERN}")
      message(FATAL_ERROR "seed ${seed}: status ${status}, but the output does not match \"${PATTERN}\":\n${output}")
    endif()
    if(output MATCHES "cuda_on_host: " AND NOT status EQUAL 86)
      message(FATAL_ERROR "seed ${seed}: status ${status} instead of 86:\n${output}")
    endif()
    message("caught under seed ${seed}, status ${status}:\n${output}")
    return()
  endif()
endforeach()
message(FATAL_ERROR "${CASE} was not caught under any seed:\n${output}")
