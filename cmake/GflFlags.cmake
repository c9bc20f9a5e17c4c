# SPDX-License-Identifier: Apache-2.0
# The flags of flags.json, the list that setup.py reads too.
set(_gfl_flags_file "${PROJECT_SOURCE_DIR}/build_backend/gfl_build/flags.json")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${_gfl_flags_file}")
file(READ "${_gfl_flags_file}" _gfl_flags_json)

# A list of the file as a CMake list.
function(gfl_flag_list out name)
  string(JSON length LENGTH "${_gfl_flags_json}" "${name}")
  set(values "")
  if(length GREATER 0)
    math(EXPR last "${length} - 1")
    foreach(index RANGE ${last})
      string(JSON value GET "${_gfl_flags_json}" "${name}" ${index})
      list(APPEND values "${value}")
    endforeach()
  endif()
  set(${out} "${values}" PARENT_SCOPE)
endfunction()

string(JSON GFL_CXX_STD GET "${_gfl_flags_json}" std)
gfl_flag_list(GFL_CXX_FLAGS cxx)
gfl_flag_list(GFL_NVCC_FLAGS nvcc)
gfl_flag_list(GFL_NVCC_HOST_FLAGS nvcc_host)
gfl_flag_list(GFL_CUDA_ARCHS cuda_archs)

# Give a target the project's flags. -O3 is the build type's, so that a debug build stays one, and a shared library shows
# its symbols: the launchers carry no export marks.
function(gfl_set_flags target)
  set(host ${GFL_CXX_FLAGS})
  set(device ${GFL_NVCC_FLAGS})
  set(device_host ${GFL_NVCC_HOST_FLAGS})
  foreach(flags host device device_host)
    list(REMOVE_ITEM ${flags} -O3 -fvisibility=hidden)
  endforeach()
  list(JOIN device_host "," device_host)
  if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${host}>"
                                             "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=${device_host}>")
  endif()
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${device}>")
  set_target_properties(${target} PROPERTIES CXX_STANDARD ${GFL_CXX_STD} CXX_STANDARD_REQUIRED ON
                                             CUDA_STANDARD ${GFL_CXX_STD} CUDA_STANDARD_REQUIRED ON)
endfunction()
